"""Teachers of another tokenizer, from the student's rows to its loss; transformers runs them."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cluster.actors.object_store import pack
from cluster.config.stages import AlignmentConfig, TeacherConfig
from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import FLOOR
from cluster.contracts.trajectory import GeneratedTrajectory, make_generated, ragged
from cluster.contracts.wire import from_wire, to_wire
from cluster.models.alignment import TokenMap
from cluster.models.token_bytes import TokenBytes
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from teacher_workers.actor import TeacherWorker
from teacher_workers.backends.aligned import AlignedBackend
from teacher_workers.backends.base import find_backend
from teacher_workers.translation import translate
from tests.builders import make_trajectory
from tests.learner.support import objective_of
from tests.made_tokenizers import byte_level, permuted, sentencepiece
from tests.teacher_workers.backends.transformers_teacher import BACKEND, write_model

TEXTS = [" 12 + 30 = 42", "the lazy dog \u05e9\u05dc", " caf\u00e9 \U0001f600 over"]
CANDIDATES = 8
OBJECTIVE = objective_of("cross-tokenizer", support_size=CANDIDATES)
PLAIN, ALIGNED = (ScoreRequest("teacher", given_candidates=True, aligned=aligned) for aligned in (False, True))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(40)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    return write_model(tmp_path_factory.mktemp("student"), tokenizer)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    return write_model(tmp_path_factory.mktemp("teacher"), tokenizer, seed=1)


def section(model: str, student: str, **fields: Any) -> TeacherConfig:
    fields = {"backend": BACKEND, "tokenizer": "aligned", "alignment": AlignmentConfig(student)} | fields
    return TeacherConfig(model, **fields)


def rows_of(student: str, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]] | None = None) -> pa.RecordBatch:
    """Return completions of the texts with the student's own most likely candidates, the teacher's prompts beside."""
    tokens, model = TokenBytes(tokenizer, "student"), AutoModelForCausalLM.from_pretrained(student)
    rows: list[GeneratedTrajectory] = []
    for number, text in enumerate(TEXTS):
        prompt, completion = [1, *(tokens.write(b"the fox") or [])], [*(tokens.write(text.encode()) or []), 2]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        best = logits.log_softmax(-1).topk(CANDIDATES)
        of_teacher = {} if prompts is None else {"teacher": np.array(prompts[number], np.int32)}
        rows.append(
            make_trajectory(
                prompt,
                completion,
                trajectory_id=number,
                candidate_ids=best.indices.int().numpy(),
                candidate_rollout_logprobs=best.values.numpy(),
                scorer_prompts=of_teacher,
            )
        )
    return make_generated(rows)


def scored_by(teacher: TeacherConfig, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[pa.RecordBatch, Any]:
    worker = TeacherWorker("teacher-0", find_backend(teacher)(teacher, 256))
    scored, metrics = asyncio.run(worker.score(batch, request))
    return from_wire(to_wire(scored), "scored"), report(metrics)


def evaluate(batch: pa.RecordBatch, student: str) -> Evaluation:
    """Return what the learner makes of scored rows, with the student's logits."""
    rows = trajectories([batch])
    micro = build_micro_batch(tuple((index,) for index in range(len(rows))), rows, seed=0)
    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        segments = [torch.from_numpy(row.token_ids.astype(np.int64))[None] for row in rows]
        width = micro.input_ids.shape[1]
        logits = torch.cat(
            [torch.nn.functional.pad(model(ids).logits[0], (0, 0, 0, width - ids.shape[1])) for ids in segments]
        )
    objective = Objective(OBJECTIVE)
    chosen = logits[micro.predicting]
    return objective.evaluate(chosen, micro.tokens, objective.plan(micro.tokens, None), {}, with_gradient=True)


def test_the_same_tokenizer_twice_is_strict_everywhere_and_has_the_loss_of_student_topk(
    student: str, teacher: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = rows_of(student, tokenizer)
    plain, _ = scored_by(section(teacher, student, tokenizer=None), batch, PLAIN)
    aligned, metrics = scored_by(section(teacher, student), batch, ALIGNED)
    assert metrics["teacher/coverage"] == 1
    assert metrics["teacher/dropped_rows"] == 0
    assert metrics["teacher/student_shared_mass"] == 1
    assert metrics["teacher/teacher_shared_mass"] == pytest.approx(1, abs=1e-5)
    expected, found = evaluate(plain, student), evaluate(aligned, student)
    assert found.losses.numpy() == pytest.approx(expected.losses.numpy(), abs=1e-6)
    assert expected.losses.max() > 0.1
    assert (found.logits_gradient - expected.logits_gradient).abs().max() < 1e-6


def test_a_permuted_vocabulary_has_the_same_loss(
    tmp_path: Path, student: str, teacher: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    order = np.random.default_rng(3).permutation(len(tokenizer))
    moved = write_model(tmp_path, permuted(tokenizer, order.tolist()), seed=1, order=torch.from_numpy(order))
    batch = rows_of(student, tokenizer)
    prompts = [order[row[mask == 0]].tolist() for row, mask in of_rows(batch)]
    plain, _ = scored_by(section(teacher, student, tokenizer=None), batch, PLAIN)
    aligned, metrics = scored_by(section(moved, student), rows_of(student, tokenizer, prompts), ALIGNED)
    assert metrics["teacher/coverage"] == 1
    expected, found = evaluate(plain, student), evaluate(aligned, student)
    assert found.losses.numpy() == pytest.approx(expected.losses.numpy(), abs=1e-6)
    assert (found.logits_gradient - expected.logits_gradient).abs().max() < 1e-6


def of_rows(batch: pa.RecordBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
    return [(token_ids[row], loss_mask[row]) for row in range(batch.num_rows)]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("foreign"), sentencepiece(25), seed=2)


def test_a_foreign_teacher_scores_its_own_row_before_each_strict_token(
    student: str, foreign: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = sentencepiece(25)
    prompt = other("the fox", add_special_tokens=False)["input_ids"]
    batch = rows_of(student, tokenizer, [prompt] * len(TEXTS))
    scored, metrics = scored_by(section(foreign, student), batch, ALIGNED)
    token_map = TokenMap(TokenBytes(tokenizer, "a"), TokenBytes(other, "b"), [2])
    model = AutoModelForCausalLM.from_pretrained(foreign)
    num_strict = 0
    columns = [ragged(scored, f"teacher_{name}") for name in ("aligned", "logprobs", "candidate_logprobs", "shared")]
    candidates = ragged(batch, "candidate_ids")
    for row, (token_ids, mask) in enumerate(of_rows(batch)):
        alignment = token_map.align(token_ids[mask != 0])
        assert alignment is not None
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *alignment.token_ids.tolist()]])).logits[0]
        strict, logprobs, of_candidates, shared = (column[row] for column in columns)
        assert np.flatnonzero(strict).tolist() == alignment.student_positions.tolist()
        num_strict += len(alignment.student_positions)
        for ours, theirs in zip(alignment.student_positions, alignment.teacher_positions, strict=True):
            before = logits[len(prompt) + theirs - 1].log_softmax(-1)
            assert logprobs[ours] == pytest.approx(before[alignment.token_ids[theirs]].item(), abs=1e-4)
            mapped = token_map.to_teacher(candidates[row][ours])
            assert shared[ours].tolist() == (mapped >= 0).astype(int).tolist()
            expected = before[torch.from_numpy(mapped[mapped >= 0].astype(np.int64))].numpy()
            assert of_candidates[ours][mapped >= 0] == pytest.approx(expected, abs=1e-4)
        assert (logprobs[strict == 0] == FLOOR).all()
        assert (of_candidates[shared == 0] == FLOOR).all()
    assert 0 < num_strict < len(columns[1].values)
    assert metrics["teacher/coverage"] == pytest.approx(num_strict / len(columns[1].values))
    assert 0 < metrics["teacher/teacher_shared_mass"] < 1
    assert metrics["teacher/scored_tokens"] == num_strict


def test_the_students_eos_is_all_that_ends_the_teachers_turns(
    student: str, foreign: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = rows_of(student, tokenizer, [[1, 50]] * len(TEXTS))
    ends = (2, 300)
    apart, _ = scored_by(section(foreign, student), batch, ALIGNED)
    together, _ = scored_by(section(foreign, student, stop_class=ends), batch, ALIGNED)
    model = AutoModelForCausalLM.from_pretrained(foreign)
    token_ids, mask = of_rows(batch)[0]
    alignment = TokenMap(TokenBytes(tokenizer, "a"), TokenBytes(sentencepiece(25), "b"), [2]).align(
        token_ids[mask != 0]
    )
    assert alignment is not None
    with torch.no_grad():
        before = model(torch.tensor([[1, 50, *alignment.token_ids.tolist()]])).logits[0, -2].log_softmax(-1)
    expected = before[list(ends)].logsumexp(0).item()
    assert ragged(together, "teacher_logprobs")[0][-1] == pytest.approx(expected, abs=1e-4)
    assert ragged(apart, "teacher_logprobs")[0][-1] == pytest.approx(before[2].item(), abs=1e-4)


def test_what_is_not_strict_enters_nothing(student: str, foreign: str, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = rows_of(student, tokenizer, [[1]] * len(TEXTS))
    scored, _ = scored_by(section(foreign, student), batch, ALIGNED)
    found = evaluate(scored, student)
    strict = ragged(scored, "teacher_aligned").values != 0
    assert len(found.losses) == strict.sum()
    poisoned = scored
    for name in ("teacher_logprobs", "teacher_candidate_logprobs", "rollout_logprobs"):
        values = ragged(scored, name).values.copy()
        values[~strict] = -3.0
        index = poisoned.schema.get_field_index(name)
        column = poisoned[name]
        inner = pa.array(values.reshape(-1))
        inner = inner if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(inner, values.shape[1])
        poisoned = poisoned.set_column(
            index, poisoned.schema.field(index), pa.ListArray.from_arrays(column.offsets, inner)
        )
    again = evaluate(poisoned, student)
    assert torch.equal(again.losses, found.losses)
    assert torch.equal(again.candidate_mass, found.candidate_mass)
    _, handle = pack(scored, {})
    of_rows = np.split(strict, ragged(scored, "rollout_logprobs").offsets[1:-1])
    assert handle.num_loss_tokens == tuple(int(row.sum()) for row in of_rows)


def test_an_absent_candidate_takes_no_part(student: str, foreign: str, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = rows_of(student, tokenizer, [[1]] * len(TEXTS))
    scored, _ = scored_by(section(foreign, student), batch, ALIGNED)
    [micro] = [build_micro_batch(((0, 1, 2),), trajectories([scored]), seed=0)]
    shared = micro.tokens.shared
    assert shared is not None
    assert not shared.all()
    gradient = evaluate(scored, student).logits_gradient
    assert gradient is not None
    absent = gradient.gather(-1, micro.tokens.candidate_ids)[~shared]
    assert absent.abs().max() < 1e-6  # rounding of gradients that cancel


def test_low_coverage_ends_the_run_in_one_sentence(
    student: str, tokenizer: PreTrainedTokenizerFast, foreign: str
) -> None:
    backend = AlignedBackend(section(foreign, student, min_coverage=0.99), 256)
    batch = rows_of(student, tokenizer, [[1]] * len(TEXTS))
    scores, _ = asyncio.run(backend.score(batch, ALIGNED))  # too few tokens to judge
    assert set(scores) == ALIGNED.signals

    async def many() -> None:
        for _ in range(60):
            await backend.score(batch, ALIGNED)

    with pytest.raises(ScoreError, match=r"% of the student's tokens cover .* min_coverage = 0.99; take a teacher"):
        asyncio.run(many())


def test_rows_end_where_the_engine_has_no_room(student: str, tokenizer: PreTrainedTokenizerFast) -> None:
    token_map = TokenMap(TokenBytes(tokenizer, "a"), TokenBytes(tokenizer, "b"), [2])
    batch = rows_of(student, tokenizer)
    first = of_rows(batch)[0][1]
    prompt = int((first == 0).sum())
    rows = translate(batch, token_map, "teacher", max_tokens=prompt + 3)
    assert rows.batch is not None
    assert ragged(rows.batch, "token_ids").lengths.tolist() == [prompt + 3] * len(TEXTS)
    assert len(rows.places) == 3 * len(TEXTS)


def test_an_audit_reads_the_teachers_own_ids(student: str, foreign: str) -> None:
    backend = AlignedBackend(section(foreign, student), 256)
    batch = make_generated([make_trajectory([1, 4], [5, 6])])
    own, _ = asyncio.run(backend.score(batch, ScoreRequest("teacher", entropy=True)))
    assert set(own) == {"logprobs", "entropy"}
    assert (own["logprobs"] > FLOOR).all()


def test_the_identity_has_the_map(student: str, foreign: str) -> None:
    one, other = (
        AlignedBackend.identity(section(foreign, student, alignment=AlignmentConfig(student, digest=digest)))
        for digest in ("aa", "bb")
    )
    assert one.endswith("+aa")
    assert one.removesuffix("aa") == other.removesuffix("bb")
