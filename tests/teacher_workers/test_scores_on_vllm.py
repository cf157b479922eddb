"""Real vLLM teachers in fp32 and bf16 against transformers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from cluster.actors.object_store import pack
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ActorError, ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import FLOOR
from cluster.contracts.trajectory import make_generated, models_in, ragged
from cluster.contracts.wire import from_wire
from cluster.models.lm_head import load_lm_head
from cluster.models.token_scores import score_tokens
from teacher_workers.pool import TeacherPool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory
from tests.tiny_qwen3 import CONTEXT_TOKENS, NUM_WORDS, expected_logprobs, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engines to start

NUM_CANDIDATES = 8
TOLERANCE = 1e-4  # nats; two implementations of the same fp32 model
BFLOAT16_STEP = 2**-7  # from a number to the next, as a part of it, at most


@pytest.fixture(scope="module")
def model(tiny_teacher: Path) -> Any:
    return load(tiny_teacher)


def make_handle(first_id: int, num_rows: int = 2, route: str = "exact", longest: int = 60) -> BatchHandle:
    draw = np.random.default_rng(first_id)
    rows = [
        make_trajectory(
            prompt=draw.integers(4, 112, 5 + row),
            completion=draw.integers(4, 112, longest - 10 * row),
            trajectory_id=first_id + row,
            teacher=route,
        )
        for row in range(num_rows)
    ]
    wire, handle = pack(make_generated(rows), {})
    return replace(handle, reference=ray.put(wire))


def read(handle: BatchHandle) -> pa.RecordBatch:
    return from_wire(ray.get(handle.reference), "scored")


@torch.no_grad()
def expected_rows(model: Any, batch: pa.RecordBatch) -> Iterator[tuple[int, np.ndarray, torch.Tensor, torch.Tensor]]:
    """Yield of each row its number, written tokens, their hidden states and log-probabilities by transformers."""
    for row in range(batch.num_rows):
        token_ids = ragged(batch, "token_ids")[row]
        positions = np.flatnonzero(ragged(batch, "loss_mask")[row])
        ids = torch.from_numpy(token_ids.astype(np.int64)).unsqueeze(0)
        hidden = model.get_decoder()(ids).last_hidden_state[0, positions - 1]
        logprobs = model(ids).logits[0, positions - 1].log_softmax(-1)  # [completion_tokens, vocabulary]
        yield row, token_ids[positions], hidden, logprobs


def test_every_batch_is_scored_once_and_equals_transformers(pools: dict[str, TeacherPool], model: Any) -> None:
    request = ScoreRequest("teacher", top_k=NUM_CANDIDATES, entropy=True, hidden=True)
    teachers = TeacherRouter(pools, call_seconds=60)
    handles = list(teachers.score((make_handle(10 * i) for i in range(6)), lambda route: [(route, request)]))
    assert sorted(handle.trajectory_ids for handle in handles) == [(10 * i, 10 * i + 1) for i in range(6)]
    for batch in map(read, handles):
        for row, written, hidden, logprobs in expected_rows(model, batch):
            own = ragged(batch, "teacher_logprobs")[row]
            assert np.abs(own - logprobs[np.arange(len(written)), written].numpy()).max() < TOLERANCE
            # One position too early or too late would be another distribution altogether.
            assert np.abs(own[1:] - logprobs[np.arange(len(written) - 1), written[1:]].numpy()).max() > 1
            best = logprobs.topk(NUM_CANDIDATES).values
            assert np.abs(ragged(batch, "teacher_candidate_logprobs")[row] - best.numpy()).max() < TOLERANCE
            ids = torch.from_numpy(ragged(batch, "candidate_ids")[row].astype(np.int64))
            assert (logprobs.gather(1, ids) - best).abs().max() < TOLERANCE  # the same ids, up to ties
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            assert np.abs(ragged(batch, "teacher_entropy")[row] - entropy.numpy()).max() < TOLERANCE
            assert np.abs(ragged(batch, "teacher_hidden")[row] - hidden.numpy()).max() < TOLERANCE


def test_the_engines_scores_are_what_a_head_makes_of_its_hidden_states(
    pools: dict[str, TeacherPool], tiny_teacher: Path
) -> None:
    request = ScoreRequest("teacher", top_k=NUM_CANDIDATES, entropy=True, hidden=True)
    (handle,) = TeacherRouter(pools, call_seconds=60).score([make_handle(0)], lambda _: [("exact", request)])
    batch = read(handle)
    states = torch.from_numpy(ragged(batch, "teacher_hidden").values.copy())
    written = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
    again = score_tokens(load_lm_head(str(tiny_teacher), False, "float32"), states, written, request)
    for name in ("logprobs", "candidate_logprobs", "entropy"):
        np.testing.assert_allclose(ragged(batch, f"teacher_{name}").values, again[name], rtol=0, atol=1e-6)


def test_a_batch_goes_through_its_chain_and_each_model_adds_its_columns(
    pools: dict[str, TeacherPool], model: Any
) -> None:
    chain = [
        ("coarse", ScoreRequest("base", top_k=NUM_CANDIDATES, hidden=True)),
        ("exact", ScoreRequest("teacher", given_candidates=True)),
    ]
    teachers = TeacherRouter(pools, call_seconds=60)
    handles = list(teachers.score((make_handle(10 * i) for i in range(3)), lambda route: chain))
    assert sorted(handle.trajectory_ids for handle in handles) == [(0, 1), (10, 11), (20, 21)]
    assert teachers.maintain() == []
    num_unlikely = 0
    for handle, batch in zip(handles, map(read, handles), strict=True):
        assert models_in(batch.schema) == ["base", "teacher"]
        assert {"base/logprob", "teacher/logprob"} < set(handle.metrics)
        for row, _, _, logprobs in expected_rows(model, batch):
            ids = torch.from_numpy(ragged(batch, "candidate_ids")[row].astype(np.int64))
            given = logprobs.gather(1, ids)
            assert np.abs(ragged(batch, "teacher_candidate_logprobs")[row] - given.numpy()).max() < TOLERANCE
            num_unlikely += int((given < logprobs.topk(NUM_CANDIDATES).values[:, -1:]).sum())
    assert num_unlikely > 0  # the exact teacher would not have chosen all of them itself


def test_a_row_with_a_context_is_scored_behind_it_and_no_other_rows_context_matters(
    pools: dict[str, TeacherPool], model: Any
) -> None:
    draw = np.random.default_rng(3)
    completions = [draw.integers(4, 112, 12 + row) for row in range(3)]
    contexts = [draw.integers(4, 112, length).astype(np.int32) for length in (30, 0, 9)]  # none: the student's prompt
    prompt = draw.integers(4, 112, 6).astype(np.int32)

    def score(contexts: list[np.ndarray]) -> list[np.ndarray]:
        rows = [
            make_trajectory(prompt, completion, trajectory_id=row, teacher="exact", scorer_prompts={"teacher": context})
            for row, (completion, context) in enumerate(zip(completions, contexts, strict=True))
        ]
        wire, handle = pack(make_generated(rows), {})
        handle = replace(handle, reference=ray.put(wire))
        router = TeacherRouter(pools, call_seconds=60)
        (scored,) = router.score([handle], lambda route: [(route, ScoreRequest("teacher"))])
        logprobs = ragged(read(scored), "teacher_logprobs")
        return [logprobs[row] for row in range(len(completions))]

    scores = score(contexts)
    for completion, context, own in zip(completions, contexts, scores, strict=True):
        read_before = context if len(context) else prompt
        expected = expected_logprobs(model, [*read_before.tolist(), *completion.tolist()])[len(read_before) - 1 :]
        written = expected.numpy()[np.arange(len(completion)), completion]
        assert np.abs(own - written).max() < TOLERANCE
    others = score([contexts[0], contexts[2], contexts[1]])
    assert np.abs(others[0] - scores[0]).max() < 1e-6
    assert np.abs(others[1] - scores[1]).max() > 0.1


def test_bfloat16_hidden_states_give_the_scores_again(pools: dict[str, TeacherPool], tiny_teacher: Path) -> None:
    request = ScoreRequest("teacher", hidden=True)
    (handle,) = TeacherRouter(pools, call_seconds=60).score([make_handle(0)], lambda _: [("coarse", request)])
    batch = read(handle)
    bits = ragged(batch, "teacher_hidden").values
    assert bits.dtype == np.uint16
    head = load_lm_head(str(tiny_teacher), False, "bfloat16")
    logits = head.logits(torch.from_numpy(bits.copy()).view(torch.bfloat16))
    logprobs = logits.log_softmax(-1)
    written = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
    own = ragged(batch, "teacher_logprobs").values
    # The product is rounded to bfloat16, now and then to the neighbouring number, here and in the sum over all tokens.
    atol = 2 * BFLOAT16_STEP * float(logits.abs().max())
    np.testing.assert_allclose(own, logprobs[np.arange(len(written)), written].numpy(), atol=atol)


def test_states_of_every_layer_come_with_the_scores_of_one_prefill(pools: dict[str, TeacherPool], model: Any) -> None:
    request = ScoreRequest("teacher", hidden=True, layers=True)
    batches = [make_handle(70, longest=40), make_handle(70, longest=40)]  # the second's prompts are cached
    for handle in TeacherRouter(pools, call_seconds=60).score(batches, lambda _: [("coarse", request)]):
        batch = read(handle)
        bits = ragged(batch, "teacher_layers")
        assert bits.values.dtype == np.uint16
        assert ragged(batch, "teacher_hidden").values.tolist() == bits.values[:, 64:].tolist()  # the last is normed
        for row in range(batch.num_rows):
            ids = torch.from_numpy(ragged(batch, "token_ids")[row].astype(np.int64))
            predicting = np.flatnonzero(ragged(batch, "loss_mask")[row]) - 1
            with torch.no_grad():
                states = model.get_decoder()(ids[None], output_hidden_states=True).hidden_states[1:]
            expected = torch.stack([layer[0, predicting] for layer in states], 1)
            sent = torch.from_numpy(bits[row].copy()).view(torch.bfloat16).float().view_as(expected)
            errors = (sent - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert errors.max() < 8 * BFLOAT16_STEP
            assert ((sent[1:] - expected[:-1]).norm(dim=-1) / expected[:-1].norm(dim=-1)).min() > 16 * BFLOAT16_STEP


def test_replicas_agree_on_a_trajectory_that_fills_the_context(pools: dict[str, TeacherPool]) -> None:
    handle = make_handle(0, num_rows=1, longest=CONTEXT_TOKENS - 5)
    assert handle.num_tokens == (CONTEXT_TOKENS,)
    first, second = pools["coarse"].score_everywhere([handle], ScoreRequest("teacher"))
    both = [ragged(read(scored), "teacher_logprobs").values for (scored,) in (first, second)]
    assert len(both[0]) == CONTEXT_TOKENS - 5
    np.testing.assert_allclose(*both, atol=TOLERANCE)


def test_a_trajectory_beyond_the_context_is_an_error_that_names_the_replica(pools: dict[str, TeacherPool]) -> None:
    handle = make_handle(0, longest=CONTEXT_TOKENS)
    said = rf"^teacher-exact-0: vLLM could not score {CONTEXT_TOKENS + 5} tokens"
    with pytest.raises(ScoreError, match=said):
        list(TeacherRouter(pools, call_seconds=60).score([handle], lambda _: [("exact", ScoreRequest("teacher"))]))


def test_a_token_that_the_teacher_does_not_have_is_as_unlikely_as_can_be(
    pools: dict[str, TeacherPool], model: Any
) -> None:
    """Its embedding ends before the id, which a student with a larger vocabulary may write."""
    wire, handle = pack(make_generated([make_trajectory(completion=[10, NUM_WORDS + 88, 11], teacher="exact")]), {})
    teachers = TeacherRouter(pools, call_seconds=60)
    [scored] = teachers.score(
        [replace(handle, reference=ray.put(wire))], lambda _: [("exact", ScoreRequest("teacher", top_k=4))]
    )
    batch = read(scored)
    first, unknown, after = ragged(batch, "teacher_logprobs").values
    assert first == pytest.approx(float(expected_logprobs(model, [1, 2, 10])[1, 10]), abs=TOLERANCE)
    assert unknown == FLOOR
    assert FLOOR < after < 0
    assert ragged(batch, "candidate_ids").values.max() < NUM_WORDS


def test_a_batch_for_an_unknown_teacher_is_refused(pools: dict[str, TeacherPool]) -> None:
    teachers = TeacherRouter(pools, call_seconds=60)
    with pytest.raises(ScoreError, match="names the teacher 'odd'; there are"):
        list(teachers.score([make_handle(0, route="odd")], lambda route: [(route, ScoreRequest("teacher"))]))


def test_a_late_answer_is_an_error_that_names_the_replica(pools: dict[str, TeacherPool]) -> None:
    hurried = TeacherRouter(pools, call_seconds=0)
    with pytest.raises(ActorError, match="for scores from teacher-exact-0"):
        list(hurried.score([make_handle(0)], lambda _: [("exact", ScoreRequest("teacher"))]))
