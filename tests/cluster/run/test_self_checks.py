import numpy as np
import pyarrow as pa

from cluster.contracts.trajectory import add_scores, make_generated
from cluster.run.preflight import (
    NO_GPU,
    check_not_uniform,
    check_replicas,
    check_sampler_gap,
    check_self_kl,
    sample_plainly,
)
from tests.builders import make_config, make_trajectory


def make_scored(*logprobs: float) -> pa.RecordBatch:
    batch = make_generated([make_trajectory(completion=range(len(logprobs)))])
    return add_scores(batch, "teacher", {"logprobs": np.array(logprobs, dtype=np.float32)})


def test_a_run_at_another_temperature_is_checked_at_1() -> None:
    """The learner says the model's log-probabilities; those of p = (.6, .3, .1) at 0.7 are 0.17 nats off on average."""
    checked = sample_plainly(make_config("rollout.temperature=0.7", "rollout.top_p=0.9", "objective=gkd"))
    assert (checked.rollout.temperature, checked.rollout.top_p, checked.rollout.top_k) == (1, 1, 0)
    assert checked.objective.preset == "gkd"


def test_replicas_that_disagree_fail() -> None:
    assert check_replicas("t", [make_scored(-1, -2), make_scored(-1, -2)], "float32").passed
    assert not check_replicas("t", [make_scored(-1, -2), make_scored(-1, -2.01)], "float32").passed


def test_uniform_scores_fail() -> None:
    assert not check_not_uniform("t", make_scored(-4.7, -4.7, -4.7)).passed
    assert check_not_uniform("t", make_scored(-4.7, -0.1, -2.0)).passed


def test_a_learner_that_computes_other_logprobs_fails() -> None:
    written = make_generated([make_trajectory()])
    half = np.full(3, np.log(0.5), dtype=np.float32)
    assert check_sampler_gap(written, half, "float32").passed
    assert not check_sampler_gap(written, half + 0.01, "float32").passed


def test_a_shift_by_one_token_fails_the_self_kl() -> None:
    half = float(np.log(0.5))
    assert check_self_kl(make_scored(half, half, half), "float32").passed
    assert not check_self_kl(make_scored(-5.0, half, half), "float32").passed


def test_a_check_that_is_not_made_is_no_ok() -> None:
    assert NO_GPU.describe().startswith("skip  student scored as its own teacher: not checked")
