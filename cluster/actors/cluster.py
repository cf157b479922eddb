"""The one object through which the driver makes actors, waits for their answers and ends them.

Pools and groups take a `Cluster` when they are built: Ray's, or the simulated one of `preceptor plan`. Ray wraps what
an actor raises in its own exception, whose text is a stack trace; a cluster raises the actor's own PreceptorError
instead, and an ActorError when an actor died or did not answer in time. Ray is imported where it is called, for
`preceptor plan` runs the same pools without it.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.actors.worker_output import keep, last_error, output_of
from cluster.contracts.errors import ActorDiedError, ActorError, LostBytesError, ModelError, PreceptorError
from cluster.contracts.import_path import load_object

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.exceptions import RayTaskError

SHUTDOWN_TIMEOUT_SECONDS = 30.0  # an engine ends its subprocesses within a few seconds
GET_SECONDS = 60.0  # for values that are there, which Ray may still have to look up
POLL_SECONDS = 1.0  # a longer wait asks again, so often, what it waits for


@dataclass(frozen=True)
class PoolTimeouts:
    """Sets how long the driver waits for the actors of a pool."""

    start_seconds: float
    call_seconds: float


Arguments = Sequence[tuple[Any, ...]]  # of a constructor, one tuple per actor
Options = Sequence[Mapping[str, Any]]  # Ray's actor options (num_cpus, num_gpus, ...), one mapping per actor


class Cluster(ABC):
    """Makes actors, calls them and waits for their answers."""

    # What `wait_for_any` lets pass before it looks at so many references. A look costs by the reference, and so takes a
    # small part of this; what came meanwhile is seen at one look, so an answer costs the same however many are awaited.
    pause_seconds_per_reference = 0.0

    @abstractmethod
    def create(self, actor_class: str, names: Sequence[str], arguments: Arguments, options: Options) -> list[Any]:
        """Begin to start one actor per name; returns at once, before any of them runs.

        Args:
            actor_class: "package.module:Class" of an ordinary class, which the caller need not import.
            names: what the Ray dashboard shows; unique in the run.
            arguments: positional ones.
            options: where the actors run.
        """

    @abstractmethod
    def put(self, value: Any) -> Any:
        """Store a value once for all actors, and return its reference."""

    @abstractmethod
    def get(self, references: Any, timeout_seconds: float, waiting_for: str, names: Sequence[str] = ()) -> Any:
        """Return the value of a reference, or those of a list in its order.

        The first error of an actor ends the wait for the others.

        Raises:
            ActorError: an actor died (ActorDiedError), or a value did not come in time; `names` says which.
            LostBytesError: the node that held the value, or what the actor was to read, is gone.
            PreceptorError: what the actor raised.
        """

    def get_each(self, references: Sequence[Any], waiting_for: Callable[[Any], str]) -> list[Any]:
        """Return the values of references that are ready; where `get` raises an error of ours, the error itself.

        One call of `get` fetches all, for each costs as much as a few values. `waiting_for` describes one reference.
        """
        try:
            values: list[Any] = self.get(list(references), GET_SECONDS, "answers that are there") if references else []
            return values
        except PreceptorError:
            return [self._value_or_error(reference, waiting_for(reference)) for reference in references]

    def _value_or_error(self, reference: Any, waiting_for: str) -> Any:
        try:
            return self.get(reference, GET_SECONDS, waiting_for)
        except PreceptorError as error:
            return error

    @abstractmethod
    def wait(self, references: Sequence[Any], num_returns: int, timeout_seconds: float) -> list[Any]:
        """Return up to `num_returns` references that are ready, waiting for as many until the timeout."""

    @abstractmethod
    def is_dead(self, answer: Any) -> bool:
        """Return whether the actor that was to give this answer is gone; the reference must be ready."""

    def explain(self, error: PreceptorError, actor: ActorHandle) -> PreceptorError:
        """Return the error of an actor that died or cannot start, with what its processes printed about the reason."""
        return error

    @abstractmethod
    def kill(self, actor: ActorHandle) -> None:
        """End an actor, which may be dead."""

    def call_all(
        self,
        actors: Sequence[ActorHandle],
        method: str,
        *args: Any,
        timeout_seconds: float,
        waiting_for: str,
        names: Sequence[str] = (),
    ) -> list[Any]:
        """Call the method on every actor at once and return the answers in the actors' order; raises as `get`."""
        references = [getattr(actor, method).remote(*args) for actor in actors]
        answers: list[Any] = self.get(references, timeout_seconds, waiting_for, names)
        return answers

    def wait_for_any(
        self, pending: Callable[[], Sequence[Any]], timeout_seconds: float, waiting_for: Callable[[], str]
    ) -> list[Any]:
        """Return the references that are ready, at least one.

        Args:
            pending: returns what to wait for; called again every second, since it may change meanwhile.
            timeout_seconds: how long nothing may be ready.
            waiting_for: says what is late.

        Raises:
            ActorError: nothing was ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        wait_seconds = 0.0  # under load something is always ready, and the first call returns
        while True:
            references = list(pending())
            if references:
                if not wait_seconds:
                    time.sleep(len(references) * self.pause_seconds_per_reference)
                ready = self.wait(references, 1 if wait_seconds else len(references), wait_seconds)
                if ready:
                    return ready
            else:
                time.sleep(wait_seconds)
            left = deadline - time.monotonic()
            if left <= 0:
                raise ActorError(f"waited {timeout_seconds:.0f} s for {waiting_for()}")
            wait_seconds = min(POLL_SECONDS, left)

    def shutdown(self, actors: Sequence[ActorHandle], timeout_seconds: float = SHUTDOWN_TIMEOUT_SECONDS) -> None:
        """Let every actor end what it started (its `shutdown` method), then end the actors themselves."""
        self.wait([actor.shutdown.remote() for actor in actors], len(actors), timeout_seconds)
        for actor in actors:
            self.kill(actor)


class RayCluster(Cluster):
    """Runs actors on the Ray cluster that this process is connected to.

    Args:
        stand_ins: actor class -> actor class to run in its place, for tests without engines.
        logs: the folder that keeps the output of failed actors; None: only the last error is kept.
    """

    pause_seconds_per_reference = 10e-6  # `ray.wait` takes 0.5 microseconds of CPU for each

    def __init__(self, stand_ins: Mapping[str, str] | None = None, logs: Path | None = None) -> None:
        self._stand_ins = stand_ins or {}
        self._logs = logs

    def create(self, actor_class: str, names: Sequence[str], arguments: Arguments, options: Options) -> list[Any]:
        import ray

        # The class is imported now: a driver that only plans, checks or reports imports no torch.
        remote = ray.remote(load_object(self._stand_ins.get(actor_class, actor_class), "an actor class"))
        return [
            remote.options(name=name, **option).remote(*argument)
            for name, argument, option in zip(names, arguments, options, strict=True)
        ]

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def get(self, references: Any, timeout_seconds: float, waiting_for: str, names: Sequence[str] = ()) -> Any:
        """Return the value of a reference, or those of a list, with errors of ours in place of Ray's."""
        import ray
        from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

        try:
            return ray.get(references, timeout=timeout_seconds)
        except GetTimeoutError as error:
            late = self._late(references, names) if isinstance(references, list) else ""
            raise ActorError(f"waited {timeout_seconds:.0f} s for {waiting_for}{late}") from error
        except RayTaskError as error:
            if isinstance(error.cause, ActorDiedError):  # its engine did
                died = ActorDiedError(f"while waiting for {waiting_for}: {error.cause}")
                raise self._explained(died, _actor_of(error)) from error
            if isinstance(error.cause, PreceptorError):
                raise self._explained(error.cause, _actor_of(error)) from error
            if isinstance(error.cause, ObjectLostError):
                raise LostBytesError(f"while waiting for {waiting_for}: {_first_line(error.cause)}") from error
            self._keep_trace(error)
            raise
        except RayActorError as error:
            died = ActorDiedError(f"while waiting for {waiting_for}: {_first_line(error)}")
            raise self._explained(died, error.actor_id or "") from error
        except ObjectLostError as error:
            raise LostBytesError(f"while waiting for {waiting_for}: {_first_line(error)}") from error

    def wait(self, references: Sequence[Any], num_returns: int, timeout_seconds: float) -> list[Any]:
        import ray

        if not references:  # ray.wait refuses to wait for nothing
            return []
        ready: list[Any] = ray.wait(list(references), num_returns=num_returns, timeout=timeout_seconds)[0]
        return ready

    def is_dead(self, answer: Any) -> bool:
        """Return whether Ray has the actor's death in place of its answer."""
        import ray

        try:
            ray.get(answer)
        except ray.exceptions.RayActorError:
            return True
        return False

    def kill(self, actor: ActorHandle) -> None:
        import ray

        with suppress(ray.exceptions.RayError):  # already dead
            ray.kill(actor, no_restart=True)

    def explain(self, error: PreceptorError, actor: ActorHandle) -> PreceptorError:
        return self._explained(error, actor._actor_id.hex())

    def _explained(self, error: PreceptorError, actor_id: str) -> PreceptorError:
        """Return the error with the last one that its actor printed, and with the file that keeps the rest."""
        if not isinstance(error, ActorDiedError | ModelError) or not actor_id:
            return error
        name, output = output_of(actor_id)
        printed = last_error(output)
        parts = [str(error).rstrip(".")]
        if isinstance(error, ActorDiedError):
            parts.append(f"its last error: {printed}" if printed else "it printed no error, as when it is killed")
        if self._logs and output and (path := keep(self._logs, name, output)):
            parts.append(f"its output is in {path}")
        explained = type(error)("; ".join(parts))
        if isinstance(explained, ActorDiedError):
            explained.last_error = printed
        return explained

    def _keep_trace(self, error: RayTaskError) -> None:
        """Keep what an actor printed that raised an error of no kind of ours, and note the file in the error."""
        if self._logs and (actor_id := _actor_of(error)):
            name, output = output_of(actor_id)
            if path := keep(self._logs, name, f"{output}{error}\n"):
                error.add_note(f"its output is in {path}")

    def _late(self, references: list[Any], names: Sequence[str]) -> str:
        ready = self.wait(references, len(references), timeout_seconds=0)
        labels = names or [f"actor {position} of {len(references)}" for position in range(len(references))]
        late = (label for label, reference in zip(labels, references, strict=True) if reference not in ready)
        return f"; no answer from {', '.join(late)}"


RAY = RayCluster()  # it has no state: Ray itself knows what this process is connected to


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _actor_of(error: RayTaskError) -> str:
    """Return the id of the actor that raised an error, which Ray keeps in its text alone; "" for a task's."""
    match = re.search(r"\bactor_id=([0-9a-f]+)", str(error))
    return match[1] if match else ""
