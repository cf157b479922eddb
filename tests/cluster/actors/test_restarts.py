"""Which deaths of a worker are followed by a restart."""

import pytest

from cluster.actors.restarts import RestartBudget, RestartLimit
from cluster.contracts.errors import ActorDiedError, ActorError, LostBytesError, ModelError, PreceptorError

LIMIT = RestartLimit(max_restarts=3, window_seconds=600)


def died(of: str = "") -> ActorDiedError:
    error = ActorDiedError(f"rollout-0 died; its last error: {of}")
    error.last_error = of
    return error


def num_restarts(*errors: PreceptorError) -> int:
    """Return how many of these deaths in a row, without any work between them, are followed by a restart."""
    budget = RestartBudget(LIMIT, clock=lambda: 0.0)
    for number, error in enumerate(errors):
        try:
            budget.take(0, "rollout-0", error)
        except ActorError:
            return number
    return len(errors)


@pytest.mark.parametrize(
    ("errors", "restarts"),
    [
        ((died(), died(), died()), 3),  # killed
        ((died("RuntimeError: a"), died("RuntimeError: b"), died("RuntimeError: c")), 3),
        ((died("RuntimeError: head_dim=16"), died("RuntimeError: head_dim=16")), 1),
        ((died("RuntimeError: 0x7f pid 12"), died("RuntimeError: 0x8e pid 13")), 1),
        ((died("RuntimeError: a"), died(), died("RuntimeError: a")), 2),
        ((died("NotImplementedError: no such kernel"),), 0),
        ((died("torch._C._NotImplementedErrors"), died()), 2),
        ((ModelError("vLLM cannot serve m"), ModelError("vLLM cannot serve m")), 1),
        ((ActorError("waited 5 s"), ActorError("waited 5 s"), LostBytesError("gone"), LostBytesError("gone")), 3),
    ],
)
def test_what_a_restart_cannot_cure_is_not_tried_twice(errors: tuple[PreceptorError, ...], restarts: int) -> None:
    assert num_restarts(*errors) == restarts


def test_a_worker_that_has_worked_is_started_again_whatever_it_died_of() -> None:
    budget = RestartBudget(LIMIT, clock=lambda: 0.0)
    for error in (died("NotImplementedError: x"), died("RuntimeError: y"), died("RuntimeError: y")):
        budget.note_progress(0)
        budget.take(0, "rollout-0", error)


def test_one_replica_does_not_answer_for_another() -> None:
    budget = RestartBudget(LIMIT)
    for replica in (0, 1):
        budget.take(replica, f"rollout-{replica}", died("RuntimeError: x"))


def test_the_sentence_names_the_worker_and_its_error() -> None:
    budget = RestartBudget(LIMIT)
    budget.take(0, "rollout-0", died("RuntimeError: x"))
    with pytest.raises(ActorError, match=r"its last error: RuntimeError: x; rollout-0 is not started again, for it "):
        budget.take(0, "rollout-0", died("RuntimeError: x"))
