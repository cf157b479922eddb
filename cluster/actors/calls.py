"""Starting, asking and ending groups of Ray actors, with one kind of error: ours.

Ray wraps what an actor raises in its own exception, whose text is a stack trace; everything here raises the actor's
own PreceptorError instead, and an ActorError when an actor died or did not answer in time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from cluster.contracts.errors import ActorDiedError, ActorError, LostBytesError, PreceptorError


class Answers(Protocol):
    """Waits for references and gets what they stand for, as the module `ray` does."""

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """Return the value of a reference, or those of a list, waiting for them."""

    def wait(
        self, references: Sequence[Any], *, num_returns: int, timeout: float | None
    ) -> tuple[list[Any], list[Any]]:
        """Return the references that are ready, and the others."""


class Promise:
    """A reference that is not Ray's."""

    def __init__(self, answers: Answers) -> None:
        """Say who knows when it is ready."""
        self.answers = answers


def answers_of(references: Any) -> Answers:
    """Return what to wait with for a reference, or for those of a list, which are all of one kind."""
    first = references[0] if isinstance(references, list) and references else references
    return first.answers if isinstance(first, Promise) else ray


SHUTDOWN_TIMEOUT_SECONDS = 30.0  # an engine ends its subprocesses within a few seconds
CHECK_SECONDS = 1.0  # how long a wait lasts before it looks again at what it waits for


@dataclass(frozen=True)
class PoolTimeouts:
    """How long the driver waits for the actors of a pool."""

    start_seconds: float
    call_seconds: float


def create_actors(
    cls: type,
    names: Sequence[str],
    arguments: Sequence[tuple[Any, ...]],
    options: Sequence[Mapping[str, Any]],
) -> list[ActorHandle]:
    """Ask Ray for one actor per name; returns at once, before any of them runs.

    Args:
        cls: an ordinary class.
        names: what the Ray dashboard shows; unique in the run.
        arguments: positional constructor arguments, one tuple per actor.
        options: Ray's actor options, one mapping per actor (num_cpus, num_gpus, scheduling_strategy, runtime_env).
    """
    remote = ray.remote(cls)
    return [
        remote.options(name=name, **option).remote(*argument)
        for name, argument, option in zip(names, arguments, options, strict=True)
    ]


def call_all(
    actors: Sequence[ActorHandle],
    method: str,
    *args: Any,
    timeout_seconds: float,
    waiting_for: str,
    names: Sequence[str] = (),
) -> list[Any]:
    """Call the method on every actor at once and return the answers in the actors' order.

    Raises:
        ActorError: an actor died (ActorDiedError), or did not answer in time; says which by `names`, else by position.
        PreceptorError: what an actor raised.
    """
    references = [getattr(actor, method).remote(*args) for actor in actors]
    return get_all(references, timeout_seconds, waiting_for, names)


def get_all(
    references: Sequence[Any], timeout_seconds: float, waiting_for: str, names: Sequence[str] = ()
) -> list[Any]:
    """Return the values of all references in their order; an actor's error ends the wait for the others.

    Raises:
        ActorError: an actor died, or did not answer in time; says which by `names`, else by position.
        PreceptorError: what an actor raised.
    """
    if not references:
        return []
    try:
        values: list[Any] = _checked_get(list(references), timeout_seconds, waiting_for)
        return values
    except GetTimeoutError as error:
        _, silent = ray.wait(list(references), num_returns=len(references), timeout=0)
        labels = names or [f"actor {position} of {len(references)}" for position in range(len(references))]
        late = ", ".join(label for label, reference in zip(labels, references, strict=True) if reference in silent)
        raise ActorError(f"waited {timeout_seconds:.0f} s for {waiting_for}; no answer from {late}") from error


def get(reference: Any, timeout_seconds: float, waiting_for: str) -> Any:
    """Return the value of a reference.

    Raises:
        ActorError: its actor died, or the value did not come in time.
        LostBytesError: the node that held the value, or what the actor was to read, is gone.
        PreceptorError: what the actor raised.
    """
    try:
        return _checked_get(reference, timeout_seconds, waiting_for)
    except GetTimeoutError as error:
        raise ActorError(f"waited {timeout_seconds:.0f} s for {waiting_for}") from error


def wait_for_any(
    pending: Callable[[], Sequence[Any]], timeout_seconds: float, waiting_for: Callable[[], str]
) -> list[Any]:
    """Return the references that are ready, at least one.

    Args:
        pending: returns what to wait for; asked anew every second, since what it looks at may change meanwhile.
        timeout_seconds: how long nothing may be ready.
        waiting_for: says what is late.

    Raises:
        ActorError: nothing was ready in time.
    """
    deadline = time.monotonic() + timeout_seconds
    patience = 0.0  # first what is there: under load there always is something, and no second look is needed
    while True:
        references = list(pending())
        if references:
            num_returns = 1 if patience else len(references)
            ready = answers_of(references).wait(references, num_returns=num_returns, timeout=patience)[0]
            if ready:
                return list(ready)
        else:
            time.sleep(patience)
        left = deadline - time.monotonic()
        if left <= 0:
            raise ActorError(f"waited {timeout_seconds:.0f} s for {waiting_for()}")
        patience = min(CHECK_SECONDS, left)


def is_dead(sign_of_life: Any) -> bool:
    """Return whether the actor that was asked for it is gone; the reference must be ready."""
    try:
        ray.get(sign_of_life)
    except RayActorError:
        return True
    return False


def shutdown(actors: Sequence[ActorHandle], timeout_seconds: float = SHUTDOWN_TIMEOUT_SECONDS) -> None:
    """Let every actor end what it started (its `shutdown` method), then end the actors themselves."""
    references = [actor.shutdown.remote() for actor in actors]
    if references:
        ray.wait(references, num_returns=len(references), timeout=timeout_seconds)
    for actor in actors:
        with suppress(RayError):  # already dead
            ray.kill(actor, no_restart=True)


def _checked_get(references: Any, timeout_seconds: float, waiting_for: str) -> Any:
    try:
        return answers_of(references).get(references, timeout=timeout_seconds)
    except RayTaskError as error:
        if isinstance(error.cause, PreceptorError):
            raise error.cause from error
        if isinstance(error.cause, ObjectLostError):
            raise LostBytesError(f"while waiting for {waiting_for}: {_first_line(error.cause)}") from error
        raise
    except RayActorError as error:
        raise ActorDiedError(f"while waiting for {waiting_for}: {_first_line(error)}") from error
    except ObjectLostError as error:
        raise LostBytesError(f"while waiting for {waiting_for}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
