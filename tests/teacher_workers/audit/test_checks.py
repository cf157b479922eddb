"""Teachers that are wrong in one way each are found through the real worker, and right ones are not."""

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.config.stages import Dtype
from cluster.contracts.columns import Ragged
from cluster.contracts.errors import ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import add_scores, make_generated, ragged
from teacher_workers.audit.checks import AGREEMENT_NATS, Answer, AuditResult, Tolerance, audit_answers
from teacher_workers.audit.probes import Probes, choose_rows, make_probes
from tests.builders import make_trajectory
from tests.teacher_workers import faulty_engines
from tests.teacher_workers.faulty_engines import RightEngine, make_worker

SCORES = ScoreRequest("teacher", entropy=True)
REQUESTS = [
    SCORES,
    ScoreRequest("teacher", top_k=8, entropy=True),
    ScoreRequest("teacher", given_candidates=True, entropy=True),
    ScoreRequest("teacher", entropy=True, hidden=True),
]
IDS = ["scores", "top-k", "given", "hidden"]
DTYPES: list[Dtype] = ["float32", "bfloat16", "float16"]


def tolerance(dtype: Dtype = "float32") -> Tolerance:
    return Tolerance(AGREEMENT_NATS[dtype], 2 * AGREEMENT_NATS[dtype])


def make_rows(lengths: tuple[int, ...] = (20, 24, 24, 30), seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    batch = make_generated([make_trajectory((1, 2, 3), draw.integers(4, 112, length - 3)) for length in lengths])
    return choose_rows([batch], len(lengths))


def ask(name: str, engine: RightEngine, probes: Probes, request: ScoreRequest = SCORES) -> Answer | ScoreError:
    async def both() -> Answer:
        worker = make_worker(name, engine)
        return Answer(*[(await worker.score(batch, request))[0] for batch in (probes.rows, probes.perturbed)])

    try:
        return asyncio.run(both())
    except ScoreError as error:
        return error


def audit(
    *engines: RightEngine,
    reference: RightEngine | None = None,
    request: ScoreRequest = SCORES,
    dtype: Dtype = "float32",
) -> AuditResult:
    """Judge replicas math-0, math-1, ... that run these engines."""
    probes = make_probes(make_rows(), request)
    answers = {f"math-{index}": ask(f"math-{index}", engine, probes, request) for index, engine in enumerate(engines)}
    known = None if reference is None else ask("then", reference, probes, request)
    assert not isinstance(known, ScoreError)
    return audit_answers("math", probes, answers, known, tolerance(dtype), request)


def found(verdict: AuditResult) -> list[tuple[str, str]]:
    return [(fault.replica, fault.kind) for fault in verdict.faults]


@pytest.mark.parametrize("request_", REQUESTS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_replicas_pass_in_every_dtype(dtype: Dtype, request_: ScoreRequest) -> None:
    engines = [RightEngine(dtype), faulty_engines.Noisy(dtype), faulty_engines.Noisy(dtype, noise=-2e-5)]
    verdict = audit(*engines, reference=RightEngine(dtype), request=request_, dtype=dtype)
    assert verdict.faults == ()
    assert verdict.trusted is not None


@pytest.mark.parametrize("seed", range(20))
def test_right_models_of_other_weights_pass_without_a_reference(seed: int) -> None:
    for dtype in DTYPES:
        assert audit(RightEngine(dtype, seed), dtype=dtype).faults == ()


@pytest.mark.parametrize("request_", REQUESTS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (faulty_engines.Nan, "not_finite"),
        (faulty_engines.PlusInfinity, "not_finite"),
        (faulty_engines.MinusInfinity, "not_finite"),
        (faulty_engines.Constant, "uniform"),
        (faulty_engines.TooLate, "misaligned"),
        (faulty_engines.TooEarly, "misaligned"),
        (faulty_engines.TooShort, "wrong_length"),
        (faulty_engines.TooLong, "wrong_length"),
        (faulty_engines.OneMoreOneLess, "wrong_length"),
        (faulty_engines.Swapped, "misaligned"),
    ],
)
def test_an_answer_that_is_wrong_by_itself_is_found_without_any_other(
    wrong: type[RightEngine], kind: str, dtype: Dtype, request_: ScoreRequest
) -> None:
    verdict = audit(wrong(dtype), request=request_, dtype=dtype)
    assert found(verdict) == [("math-0", kind)]
    assert verdict.faults[0].sentence.startswith("teacher math, replica math-0: ")
    assert verdict.faults[0].sentence.count("math-0") == 1
    assert verdict.trusted is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("wrong_class", "seed"), [(faulty_engines.Hot, 0), (RightEngine, 7)], ids=["hot", "other"])
def test_another_model_is_named_by_reference_or_by_majority(
    wrong_class: type[RightEngine], seed: int, dtype: Dtype
) -> None:
    wrong, right = wrong_class(dtype, seed), RightEngine(dtype)
    assert found(audit(wrong, reference=right, dtype=dtype)) == [("math-0", "replaced")]
    assert found(audit(right, wrong, reference=right, dtype=dtype)) == [("math-1", "disagreeing")]
    assert found(audit(right, wrong, right, dtype=dtype)) == [("math-1", "disagreeing")]


def test_of_two_replicas_that_disagree_both_are_named_and_neither_is_trusted() -> None:
    verdict = audit(RightEngine(), RightEngine(seed=7))
    assert found(verdict) == [("math-0", "disagreeing"), ("math-1", "disagreeing")]
    assert "cannot be told" in verdict.faults[0].sentence
    assert verdict.trusted is None


def test_a_tie_of_two_and_two_names_all_four() -> None:
    verdict = audit(RightEngine(), RightEngine(), RightEngine(seed=7), RightEngine(seed=7))
    assert len(verdict.faults) == 4


def test_a_replica_that_is_wrong_by_itself_has_no_vote() -> None:
    verdict = audit(faulty_engines.TooLate(), faulty_engines.TooLate(), RightEngine())
    assert found(verdict) == [("math-0", "misaligned"), ("math-1", "misaligned")]
    assert verdict.trusted is not None


def test_an_engine_that_answers_otherwise_each_time_is_found() -> None:
    verdict = audit(faulty_engines.Noisy(noise=0.3))
    assert found(verdict) == [("math-0", "misaligned")]
    assert "change before the token that was replaced" in verdict.faults[0].sentence


def change(answer: Answer, **columns: Any) -> Answer:
    """Replace columns of both halves by what functions make of them."""

    def rebuild(batch: pa.RecordBatch) -> pa.RecordBatch:
        for name, function in columns.items():
            place = batch.schema.get_field_index(f"teacher_{name}")
            values = np.ascontiguousarray(function(ragged(batch, f"teacher_{name}").values))
            inner: Any = pa.array(values.reshape(-1))
            if values.ndim == 2:
                inner = pa.FixedSizeListArray.from_arrays(inner, values.shape[1])
            column = pa.ListArray.from_arrays(batch["rollout_logprobs"].offsets, inner)
            batch = batch.set_column(place, batch.schema.field(place), column)
        return batch

    return Answer(rebuild(answer.rows), rebuild(answer.perturbed))


def judge_changed(request: ScoreRequest, dtype: Dtype = "float32", **columns: Any) -> list[tuple[str, str]]:
    """Judge what a right engine answers with changed columns, against what it answers."""
    probes = make_probes(make_rows(), request)
    answer = ask("math-0", RightEngine(dtype), probes, request)
    assert isinstance(answer, Answer)
    changed = change(answer, **columns)
    return found(audit_answers("math", probes, {"math-0": changed}, answer, tolerance(dtype), request))


def spoil(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[3] = np.nan
    return values


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("request_", REQUESTS, ids=IDS)
def test_a_column_that_is_shifted_after_scoring_is_misaligned(step: int, request_: ScoreRequest) -> None:
    assert judge_changed(request_, logprobs=lambda values: np.roll(values, step)) == [("math-0", "misaligned")]


@pytest.mark.parametrize(
    ("column", "request_"),
    [
        ("logprobs", SCORES),
        ("entropy", SCORES),
        ("candidate_logprobs", REQUESTS[1]),
        ("candidate_logprobs", REQUESTS[2]),
        ("hidden", REQUESTS[3]),
    ],
)
def test_nan_in_any_column_is_found(column: str, request_: ScoreRequest) -> None:
    assert judge_changed(request_, **{column: spoil}) == [("math-0", "not_finite")]


def test_nan_among_bfloat16s_bits_is_found() -> None:
    def spoil_bits(bits: np.ndarray) -> np.ndarray:
        bits = bits.copy()
        bits[3, 0] = 0x7FC0
        return bits

    assert judge_changed(REQUESTS[3], "bfloat16", hidden=spoil_bits) == [("math-0", "not_finite")]


def test_scores_rounded_to_bfloat16_are_those_of_a_bfloat16_teacher() -> None:
    def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
        return (values.view(np.uint32) + 0x8000 & 0xFFFF0000).astype(np.uint32).view(np.float32)

    assert judge_changed(REQUESTS[1], "bfloat16", logprobs=round_to_bfloat16) == []


@pytest.mark.parametrize("request_", REQUESTS[1:3], ids=IDS[1:3])
def test_scores_that_candidates_contradict_are_found(request_: ScoreRequest) -> None:
    assert judge_changed(request_, logprobs=lambda values: 0.8 * values) == [("math-0", "contradictory")]


def test_one_score_for_every_token_is_uniform_whatever_it_is() -> None:
    assert judge_changed(SCORES, logprobs=lambda values: np.full_like(values, -1.5)) == [("math-0", "uniform")]


def test_probabilities_above_one_are_found() -> None:
    assert judge_changed(SCORES, logprobs=lambda values: -values) == [("math-0", "contradictory")]


def test_entropies_below_what_single_tokens_have_are_found() -> None:
    assert judge_changed(REQUESTS[1], entropy=lambda values: 0.1 * values) == [("math-0", "contradictory")]


def test_a_missing_column_is_a_wrong_length() -> None:
    probes = make_probes(make_rows(), SCORES)
    answer = ask("math-0", RightEngine(), probes)
    assert isinstance(answer, Answer)
    verdict = audit_answers("math", probes, {"math-0": answer}, None, tolerance(), REQUESTS[1])
    assert found(verdict) == [("math-0", "wrong_length")]
    assert "lacks the column candidate_ids" in verdict.faults[0].sentence


def test_an_answer_about_other_rows_is_found() -> None:
    answer = ask("math-0", RightEngine(), make_probes(make_rows(seed=1), SCORES))
    verdict = audit_answers("math", make_probes(make_rows(), SCORES), {"math-0": answer}, None, tolerance(), SCORES)
    assert "other rows" in verdict.faults[0].sentence


def test_an_error_of_another_kind_keeps_its_sentence() -> None:
    error = ScoreError("math-0: vLLM could not score 9 tokens: out of blocks")
    verdict = audit_answers("math", make_probes(make_rows(), SCORES), {"math-0": error}, None, tolerance(), SCORES)
    assert found(verdict) == [("math-0", "refused")]
    assert verdict.faults[0].sentence == "teacher math, replica math-0: vLLM could not score 9 tokens: out of blocks"


def test_the_worker_refuses_records_of_another_size_than_the_request_needs() -> None:
    class Wide(RightEngine):
        async def score_rows(self, *request: Any) -> Any:
            records, num_cached = await super().score_rows(*request)
            return Ragged(np.tile(records.values, 2), records.offsets), num_cached

    error = ask("math-0", Wide(), make_probes(make_rows(), SCORES))
    assert str(error).startswith("math-0: trajectory 0: the engine returned records of shape [19, ")


def test_infinite_bfloat16_states_are_refused_when_they_are_shipped() -> None:
    batch = make_generated([make_trajectory()])
    bits = np.full((3, 2), 0x7F80, np.uint16)
    with pytest.raises(ScoreError, match=r"^trajectory 0: teacher hidden hold NaN or infinity"):
        add_scores(batch, "teacher", {"logprobs": np.full(3, -1, np.float32), "hidden": bits})
