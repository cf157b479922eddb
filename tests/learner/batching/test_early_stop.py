"""Trajectories end for the learner where their teacher agrees with the sampler for a while."""

import numpy as np
import pytest

from cluster.contracts.trajectory import add_scores, make_generated
from learner.batching.early_stop import end_early, num_taught
from learner.batching.micro_batch import Trajectory, build_micro_batch, trajectories
from tests.builders import make_trajectory


@pytest.mark.parametrize(
    ("log_ratios", "count"),
    [
        ([1.0, 0.2, 0.0, 0.1, 0.0, 3.0], 3),  # -0.2 and 0.0: 0.1 on average
        ([-1.0, -0.2, 0.0], 3),  # sizes count
        ([0.1, 0.1, 5.0], 2),
        ([1.0, 1.0, 1.0], 3),
        ([0.0], 1),  # shorter than the window
        ([], 0),
    ],
)
def test_a_trajectory_ends_after_the_first_window_below_the_bound(log_ratios: list[float], count: int) -> None:
    assert num_taught(np.array(log_ratios), window=2, below=0.15) == count


def test_where_it_ends_depends_on_earlier_tokens_alone() -> None:
    """Changing a token beyond the end changes nothing; so the token at each place counts whatever it is itself."""
    random = np.random.default_rng(0)
    for _ in range(100):
        log_ratios = random.normal(scale=0.3, size=20)
        count = num_taught(log_ratios, window=3, below=0.15)
        changed = np.concatenate([log_ratios[:count], random.normal(size=20 - count)])
        assert num_taught(changed, window=3, below=0.15) == count


LOG_HALF = np.float32(np.log(0.5))  # what the sampler gave every token


def make_rows() -> list[Trajectory]:
    """Return a trajectory with an observation after its second token, and one that agrees from its second token on."""
    several = make_trajectory(
        trajectory_id=0,
        token_ids=np.array([1, 2, 3, 4, 9, 5, 6, 7], np.int32),
        loss_mask=np.array([0, 0, 1, 1, 0, 1, 1, 1], np.uint8),
        rollout_logprobs=np.full(5, LOG_HALF),
    )
    plain = make_trajectory(trajectory_id=1, completion=[3, 4, 5, 6])
    teacher = LOG_HALF + np.array([1, 1, 0, 0, 1, 1, 0, 0, 0], np.float32)
    return trajectories([add_scores(make_generated([several, plain]), "teacher", {"logprobs": teacher})])


def test_what_follows_is_neither_read_nor_learned_from() -> None:
    rows = end_early(make_rows(), window=2, below=0.1)
    assert [row.token_ids.tolist() for row in rows] == [[1, 2, 3, 4, 9, 5, 6], [1, 2, 3, 4, 5]]
    assert [row.num_sampled for row in rows] == [5, 4]
    batch = build_micro_batch(((0, 1),), rows, seed=0)
    assert batch.tokens.target_ids.tolist() == [3, 4, 5, 6, 3, 4, 5]
    assert batch.tokens.position.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.tokens.length.tolist() == [5] * 4 + [4] * 3
    assert batch.predicting.tolist() == [1, 2, 4, 5, 8, 9, 10]
    whole = build_micro_batch(((0, 1),), make_rows(), seed=0)
    kept = [0, 1, 2, 3, 5, 6, 7]
    assert batch.tokens.uniform.tolist() == whole.tokens.uniform[kept].tolist()


def test_rows_that_teach_to_their_end_stay_as_they_are() -> None:
    rows = make_rows()
    assert [one is other for one, other in zip(end_early(rows, 9, 1.0), rows, strict=True)] == [True, True]
