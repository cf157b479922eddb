import numpy as np
import pytest

from cluster.contracts.errors import ScoreError, TrajectoryError
from cluster.contracts.trajectory import (
    add_scores,
    from_wire,
    make_generated,
    ragged,
    scored_schema,
    stage_of,
    to_wire,
    top_k_of,
)
from tests.builders import make_scores, make_trajectory


def test_the_wire_returns_every_value() -> None:
    batch = make_generated([make_trajectory(reward=1.0), make_trajectory(prompt=(7,), completion=(8, 9), reward=None)])
    assert from_wire(to_wire(batch), "generated").equals(batch)


def test_a_slice_travels_alone() -> None:
    big = make_generated([make_trajectory(completion=range(1000))] * 1000)
    assert to_wire(big.slice(0, 1)).size < 20_000


def test_reading_the_wire_copies_no_tokens() -> None:
    wire = to_wire(make_generated([make_trajectory(completion=range(1000))]))
    values = ragged(from_wire(wire), "token_ids").values
    assert wire.address <= values.ctypes.data < wire.address + wire.size


def test_ragged_views_a_slice_from_its_own_first_row() -> None:
    batch = make_generated([make_trajectory(completion=[9] * n) for n in (1, 2, 3)])
    column = ragged(batch.slice(1, 2), "rollout_logprobs")
    assert column.offsets.tolist() == [0, 2, 5]


def test_top_k_columns_keep_position_and_rank() -> None:
    scores = make_scores(3, top_k=2)
    scores.topk_ids[:] = [[10, 11], [20, 21], [30, 31]]
    batch = from_wire(to_wire(add_scores(make_generated([make_trajectory()]), [scores])), "scored")
    assert top_k_of(batch) == 2
    assert ragged(batch, "teacher_topk_ids")[0].tolist() == [[10, 11], [20, 21], [30, 31]]


def test_top_k_columns_of_a_slice_start_at_its_first_row() -> None:
    rows = [make_trajectory(completion=[9] * n) for n in (1, 2)]
    scores = [make_scores(n, top_k=2) for n in (1, 2)]
    scores[1].topk_ids[:] = 5
    batch = add_scores(make_generated(rows), scores).slice(1, 1)
    assert ragged(batch, "teacher_topk_ids")[0].tolist() == [[5, 5], [5, 5]]


def test_a_generated_batch_cannot_pass_for_a_scored_one() -> None:
    with pytest.raises(TrajectoryError, match="batch is 'generated', expected 'scored'"):
        from_wire(to_wire(make_generated([make_trajectory()])), "scored")


def test_bytes_of_something_else_are_refused() -> None:
    with pytest.raises(TrajectoryError, match="not an Arrow trajectory batch"):
        from_wire(b"not arrow")


def test_the_sampled_signal_costs_four_bytes_per_token_and_top_k_eight_k() -> None:
    tokens = 4096
    generated = make_generated([make_trajectory(completion=range(tokens))])
    plain = to_wire(generated).size
    for top_k, bytes_per_token in ((0, 4), (16, 4 + 8 * 16)):
        scored = to_wire(add_scores(generated, [make_scores(tokens, top_k)])).size
        assert (scored - plain) / tokens == pytest.approx(bytes_per_token, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"loss_mask": np.array([0, 1], dtype=np.uint8)}, "loss_mask has 2 values for 5 tokens"),
        ({"rollout_logprobs": np.zeros(2, dtype=np.float32)}, "rollout_logprobs has 2 values for 3 completion tokens"),
        ({"rollout_logprobs": np.array([0, np.nan, 0], dtype=np.float32)}, "NaN or infinity"),
        ({"loss_mask": np.array([1, 0, 0, 1, 1], dtype=np.uint8)}, "first token is marked as sampled"),
    ],
)
def test_a_row_that_breaks_the_contract_is_named(fields: dict, sentence: str) -> None:
    with pytest.raises(TrajectoryError, match=f"trajectory 7: .*{sentence}"):
        make_generated([make_trajectory(trajectory_id=7, **fields)])


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([], "teacher returned 0 scores for 1 trajectories"),
        ([make_scores(2)], "cover 2 tokens, the completion has 3"),
        ([make_scores(3, logprob=float("nan"))], "NaN or infinity"),
        ([make_scores(3, top_k=2, logprob=float("-inf"))], "NaN or infinity"),
    ],
)
def test_scores_that_cannot_be_training_data_are_refused(scores: list, sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        add_scores(make_generated([make_trajectory()]), scores)


def test_an_empty_batch_has_the_scored_schema() -> None:
    batch = add_scores(make_generated([]), [])
    assert batch.schema.equals(scored_schema(0))
    assert stage_of(batch) == "scored"
