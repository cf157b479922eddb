from typing import Any

import numpy as np
import pytest

from cluster.contracts.errors import ScoreError, TrajectoryError
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import (
    add_scores,
    generated_schema,
    make_generated,
    models_in,
    num_candidates_of,
    ragged,
    row_id,
    stage_of,
)
from cluster.contracts.wire import from_wire, to_wire
from tests.builders import make_scores, make_trajectory


def test_the_wire_returns_every_value() -> None:
    batch = make_generated([make_trajectory(reward=1.0), make_trajectory(prompt=(7,), completion=(8, 9), reward=None)])
    assert from_wire(to_wire(batch), "generated").equals(batch)


def test_a_row_keeps_large_ids_and_the_bits_of_its_log_probabilities() -> None:
    logprobs = np.array([-1e-6, -12.345678], np.float32)  # neither fits 16 bits
    row = make_trajectory(completion=(3, 4), trajectory_id=2**40, prompt_id=2**40, rollout_logprobs=logprobs)
    batch = from_wire(to_wire(make_generated([row])))
    assert ragged(batch, "rollout_logprobs").values.tobytes() == logprobs.tobytes()
    assert (batch["trajectory_id"][0].as_py(), batch["prompt_id"][0].as_py()) == (2**40, 2**40)


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


def test_candidates_keep_position_and_rank() -> None:
    scores = make_scores(3, top_k=2)
    scores["candidate_ids"][:] = [[10, 11], [20, 21], [30, 31]]
    batch = from_wire(to_wire(add_scores(make_generated([make_trajectory()]), "teacher", scores)), "scored")
    assert num_candidates_of(batch) == 2
    assert ragged(batch, "candidate_ids")[0].tolist() == [[10, 11], [20, 21], [30, 31]]


def test_candidates_of_a_slice_start_at_its_first_row() -> None:
    scores = make_scores(3, top_k=2)
    scores["candidate_ids"][1:] = 5
    batch = add_scores(make_generated([make_trajectory(completion=[9] * n) for n in (1, 2)]), "teacher", scores)
    assert ragged(batch.slice(1, 1), "candidate_ids")[0].tolist() == [[5, 5], [5, 5]]


def test_a_slice_can_be_scored() -> None:
    batch = make_generated([make_trajectory(completion=[9] * n) for n in (1, 2, 3)]).slice(1, 2)
    scored = add_scores(batch, "teacher", {"logprobs": np.arange(5, dtype=np.float32)})
    assert [ragged(scored, "teacher_logprobs")[row].tolist() for row in range(2)] == [[0, 1], [2, 3, 4]]


def test_each_model_adds_its_own_columns() -> None:
    scored = add_scores(make_generated([make_trajectory()]), "teacher", make_scores(3, top_k=2, logprob=-1))
    given = {
        "entropy": np.full(3, 0.5, np.float32),
        "logprobs": np.full(3, -2, np.float32),
        "candidate_logprobs": np.full((3, 2), -3, np.float32),
    }
    both = from_wire(to_wire(add_scores(scored, "base", given)))
    assert models_in(both.schema) == ["teacher", "base"]
    assert ragged(both, "teacher_candidate_logprobs").values.tolist() == [[-1, -1]] * 3
    assert ragged(both, "base_candidate_logprobs").values.tolist() == [[-3, -3]] * 3
    assert ragged(both, "base_entropy").values.tolist() == [0.5] * 3
    with pytest.raises(ScoreError, match="already has the scores of 'base'"):
        add_scores(both, "base", given)


def test_candidates_of_the_student_stand_until_the_teacher_scores_them() -> None:
    ids, logprobs = np.arange(6, dtype=np.int32).reshape(3, 2), np.full((3, 2), -1, np.float32)
    batch = make_generated([make_trajectory(candidate_ids=ids, candidate_rollout_logprobs=logprobs)])
    with pytest.raises(ScoreError, match="teacher chose candidates, but the batch already has some"):
        add_scores(batch, "teacher", make_scores(3, top_k=2))
    scored = add_scores(batch, "teacher", {"logprobs": np.zeros(3, np.float32), "candidate_logprobs": logprobs - 1})
    assert ragged(scored, "candidate_ids").values.tolist() == ids.tolist()
    assert ragged(scored, "teacher_candidate_logprobs").values.tolist() == [[-2, -2]] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_hidden_states_keep_their_bits(dtype: type) -> None:
    hidden = np.arange(12).astype(dtype).reshape(3, 4)
    scores = {"logprobs": np.zeros(3, np.float32), "hidden": hidden}
    scored = add_scores(make_generated([make_trajectory()]), "teacher", scores)
    back = ragged(from_wire(to_wire(scored)), "teacher_hidden").values
    assert back.dtype == dtype
    assert back.tolist() == hidden.tolist()


def test_a_scoring_model_reads_its_own_prompt_before_the_same_completion() -> None:
    own = {"teacher": np.array([7, 8, 9], np.int32), "base": np.empty(0, np.int32)}
    turns = {
        "token_ids": np.array([1, 2, 3, 4, 5], np.int32),
        "loss_mask": np.array([0, 1, 1, 0, 1], np.uint8),
        "rollout_logprobs": np.full(3, -1, np.float32),
    }
    rows = [
        make_trajectory((1, 2), (3, 4), scorer_prompts={**own, "teacher": np.empty(0, np.int32)}),
        make_trajectory(scorer_prompts=own, context_hash="a1", **turns),
        make_trajectory((1, 2), (), scorer_prompts=own),  # nothing of it is scored
    ]
    batch = from_wire(to_wire(make_generated(rows)))
    assert batch["context_hash"].to_pylist() == ["", "a1", ""]
    for sent in (batch, from_wire(to_wire(batch.slice(1)))):
        tokens, mask = as_read_by(sent, "teacher")
        assert [tokens[row].tolist() for row in range(len(tokens))][-2:] == [[7, 8, 9, 2, 3, 4, 5], [1, 2]]
        assert [mask[row].tolist() for row in range(len(mask))][-2:] == [[0, 0, 0, 1, 1, 0, 1], [0, 0]]
        for model in ("base", "other"):
            assert as_read_by(sent, model)[0].values.tolist() == ragged(sent, "token_ids").values.tolist()


def test_rows_of_one_batch_have_prompts_for_the_same_models() -> None:
    with pytest.raises(TrajectoryError, match=r"prompts for different models: \[\(\), \('teacher',\)\]"):
        make_generated([make_trajectory(), make_trajectory(scorer_prompts={"teacher": np.array([1], np.int32)})])


def test_rows_of_one_batch_have_equally_many_candidates() -> None:
    with pytest.raises(TrajectoryError, match=r"different numbers of candidates: \[0, 2\]"):
        make_generated([make_trajectory(), make_trajectory(candidate_ids=np.zeros((3, 2), np.int32))])


def test_a_generated_batch_cannot_pass_for_a_scored_one() -> None:
    with pytest.raises(TrajectoryError, match="batch is 'generated', expected 'scored'"):
        from_wire(to_wire(make_generated([make_trajectory()])), "scored")


def test_bytes_of_something_else_are_refused() -> None:
    with pytest.raises(TrajectoryError, match="not an Arrow trajectory batch"):
        from_wire(b"not arrow")


@pytest.mark.parametrize(
    ("scores", "bytes_per_token"),
    [
        (make_scores(4096), 4),
        (make_scores(4096, top_k=16), 4 + 8 * 16),
        ({**make_scores(4096), "hidden": np.zeros((4096, 64), np.uint16)}, 4 + 2 * 64),
        # The last layer of 1.5B and of 8B; all 28 layers of 1.5B, and of 28 and 36 what rank 8 and rank 4 leave.
        ({**make_scores(512), "hidden": np.zeros((512, 1_536), np.uint16)}, 4 + 3_072),
        ({**make_scores(512), "hidden": np.zeros((512, 4_096), np.uint16)}, 4 + 8_192),
        ({**make_scores(64), "layers": np.zeros((64, 28 * 1_536), np.uint16)}, 4 + 86_016),
        ({**make_scores(64), "layers": np.zeros((64, 36 * 4_096), np.uint16)}, 4 + 294_912),
        ({**make_scores(4096), "layers": np.zeros((4096, 28 * 8), np.uint16)}, 4 + 448),
        ({**make_scores(4096), "layers": np.zeros((4096, 36 * 4), np.uint16)}, 4 + 288),
    ],
)
def test_scores_cost_these_bytes_per_token(scores: Scores, bytes_per_token: int) -> None:
    num_tokens = len(scores["logprobs"])
    generated = make_generated([make_trajectory(completion=range(num_tokens))])
    added = to_wire(add_scores(generated, "teacher", scores)).size - to_wire(generated).size
    assert added / num_tokens == pytest.approx(bytes_per_token, rel=0.02)


def changes(*positions: int) -> dict[str, Any]:
    return {"max_policy_version": len(positions), "version_changes": np.array(positions, dtype=np.int32)}


def test_each_row_says_where_its_versions_change() -> None:
    batch = make_generated([make_trajectory(), make_trajectory(**changes(1, 1)), make_trajectory(**changes(2))])
    column = ragged(from_wire(to_wire(batch)), "version_changes")
    assert [column[row].tolist() for row in range(3)] == [[], [1, 1], [2]]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"loss_mask": np.array([0, 1], dtype=np.uint8)}, "loss_mask has 2 values for 5 tokens"),
        ({"rollout_logprobs": np.zeros(2, dtype=np.float32)}, "rollout_logprobs has 2 values for 3 completion tokens"),
        ({"rollout_logprobs": np.array([0, np.nan, 0], dtype=np.float32)}, "NaN or infinity"),
        ({"loss_mask": np.array([1, 0, 0, 1, 1], dtype=np.uint8)}, "first token is marked as sampled"),
        ({"max_policy_version": 2}, "version_changes has 0 values for policy versions 0 to 2"),
        (changes(1, 3), r"version_changes is \[1, 3\].* from 1 to 2"),  # version 2 would have written nothing
        (changes(0, 1), r"version_changes is \[0, 1\]"),  # version 0 would have written nothing
        (changes(2, 1), r"version_changes is \[2, 1\]"),
    ],
)
def test_a_row_that_breaks_the_contract_is_named(fields: dict, sentence: str) -> None:
    with pytest.raises(TrajectoryError, match=f"trajectory 7: .*{sentence}"):
        make_generated([make_trajectory(trajectory_id=7, **fields)])


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (make_scores(2), r"teacher logprobs have shape \[2\], the batch needs \[3\]"),
        ({**make_scores(3), "candidate_logprobs": np.zeros((3, 2), np.float32)}, r"shape \[3, 2\].* needs \[3, 0\]"),
        (make_scores(3, logprob=float("nan")), "trajectory 7: teacher logprobs hold NaN or infinity"),
        (make_scores(3, top_k=2, logprob=float("-inf")), "NaN or infinity"),
    ],
)
def test_scores_that_cannot_be_training_data_are_refused(scores: Scores, sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        add_scores(make_generated([make_trajectory(trajectory_id=7)]), "teacher", scores)


def test_an_empty_batch_has_the_schema_of_a_full_one() -> None:
    assert make_generated([]).schema.equals(generated_schema(), check_metadata=True)
    empty = add_scores(make_generated([]), "teacher", make_scores(0, top_k=2))
    full = add_scores(make_generated([make_trajectory()]), "teacher", make_scores(3, top_k=2))
    assert empty.schema.equals(full.schema, check_metadata=True)
    assert stage_of(empty) == "scored"


def test_every_row_says_which_version_of_each_models_weights_scored_it() -> None:
    batch = make_generated([make_trajectory(), make_trajectory(trajectory_id=1)])
    batch = add_scores(add_scores(batch, "teacher", make_scores(6), version=7), "base", make_scores(6))
    sent = from_wire(to_wire(batch.slice(1)), "scored")
    assert (sent["teacher_version"].to_pylist(), sent["base_version"].to_pylist()) == ([7], [0])


def test_a_row_is_an_episode_of_the_students_by_itself_unless_it_says_otherwise() -> None:
    rows = [make_trajectory(trajectory_id=3), make_trajectory(trajectory_id=row_id(3, 1), episode_id=3, turn=2)]
    batch = from_wire(to_wire(make_generated([*rows, make_trajectory(trajectory_id=4, sampler="hinted")])))
    assert batch["episode_id"].to_pylist() == [3, 3, 4]
    assert batch["turn"].to_pylist() == [0, 2, 0]
    assert batch["sampler"].to_pylist() == ["student", "student", "hinted"]
    assert len(set(batch["trajectory_id"].to_pylist())) == 3


@pytest.mark.parametrize("is_scored", [False, True])
def test_a_batch_that_the_release_before_recorded_is_read_with_its_rows_as_episodes(is_scored: bool) -> None:
    batch = make_generated([make_trajectory(trajectory_id=8, reward=1.0), make_trajectory(trajectory_id=9)])
    batch = add_scores(batch, "teacher", make_scores(6)) if is_scored else batch
    names = [name for name in batch.schema.names if name not in ("episode_id", "turn", "sampler")]
    old = batch.select(names).replace_schema_metadata({**batch.schema.metadata, b"preceptor.trajectory": b"4"})
    assert from_wire(to_wire(old)).equals(batch, check_metadata=True)
