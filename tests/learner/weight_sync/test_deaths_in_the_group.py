"""A rollout engine that is killed while the group for weights forms, or in a broadcast, costs nobody else.

Real processes, over gloo, which waits as NCCL does.
"""

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.contracts.errors import ActorDiedError, WeightSyncError
from cluster.weight_sync.joint_group import Meeting
from learner.weight_sync.gpu_links import NcclLink
from tests.learner.weight_sync.fake_gpus import BUCKET_BYTES, Publication, assert_all_arrived, received
from tests.learner.weight_sync.gloo_group import HOST, GlooJoin

SECONDS = 30.0  # for an answer


class Engine:
    """A rollout engine in a process of its own."""

    def __init__(self, dies_when: str) -> None:
        command = [sys.executable, "-m", "tests.learner.weight_sync.gloo_group", dies_when]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answered: list[dict[str, Any]] = []
        self.messages: list[Mapping[str, Any]] = []

    def ask(self, verb: str, argument: Any) -> "Engine":
        assert self.process.stdin is not None
        if verb == "update_weights":
            self.messages.append(argument)
        self.process.stdin.write(json.dumps([verb, argument]) + "\n")
        self.process.stdin.flush()
        return self

    def answer(self) -> dict[str, Any]:
        out = self.process.stdout
        assert out is not None
        assert select.select([out], [], [], SECONDS)[0]
        line = out.readline()
        if not line:
            raise ActorDiedError("a rollout worker died")
        self.answered.append(json.loads(line))
        return self.answered[-1]

    @property
    def has_answered(self) -> bool:
        return bool(select.select([self.process.stdout], [], [], 0.02)[0]) and self.process.poll() is None

    @property
    def weights(self) -> dict[str, Tensor]:
        payloads = [torch.tensor(answer["bytes"], dtype=torch.uint8) for answer in self.answered if "bytes" in answer]
        count = min(len(payloads), 3)  # of the last update
        return received(self.messages[-count:], payloads[-count:])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Processes:
    """Calls engines as `Recipients` calls actors."""

    def __init__(self, engines: Sequence[Engine], _: Any) -> None:
        self.workers = dict(enumerate(engines))

    def call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Engine]:
        return {position: engine.ask(method, arguments[position]) for position, engine in self.workers.items()}

    def poll(self, references: Mapping[int, Engine]) -> None:
        if any(engine.process.poll() is not None for engine in references.values()):
            raise ActorDiedError("a rollout worker died")

    def answers(
        self, references: Mapping[int, Engine], what_for: str, on_death: Callable[[], None] = lambda: None
    ) -> dict[int, Any]:
        while not all(engine.has_answered for engine in references.values()):
            if any(engine.process.poll() is not None for engine in references.values()):
                on_death()
                break
        living = {}
        for position, engine in references.items():
            with suppress(ActorDiedError):
                living[position] = engine.answer()
        self.workers = {p: worker for p, worker in self.workers.items() if p in living or not references}
        return living

    def first_error(self, references: Mapping[int, Engine], what_for: str) -> Exception | None:
        errors = []
        for position, engine in references.items():
            try:
                errors += [WeightSyncError(error) for error in [engine.answer().get("error")] if error]
            except ActorDiedError:
                del self.workers[position]
        return errors[0] if errors else None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def make_link(buffer: Tensor) -> NcclLink:
    most = max(BUCKET_BYTES, buffer.numel())
    return NcclLink(True, lambda: (HOST, free_port()), 1, most, lambda meeting, stop: meeting.form(GlooJoin(), stop))


@pytest.fixture
def start() -> Iterator[Callable[..., list[Engine]]]:
    with ExitStack() as stack:

        def start(*dies_when: str) -> list[Engine]:
            engines = [Engine(moment) for moment in dies_when]
            for engine in engines:
                stack.callback(engine.close)
            assert [engine.answer() for engine in engines] == [{}] * len(engines)
            return engines

        yield start


def test_rank_0_and_the_others_survive_deaths_at_any_moment_of_joining(start: Callable[..., list[Engine]]) -> None:
    first, invited, met = start("never", "invited", "met")
    publication = Publication(make_link, recipients=Processes)  # type: ignore[arg-type]
    sender: Any = publication.sender
    began = time.monotonic()
    sender.publish([first, invited, met], 1)
    assert_all_arrived(first.weights)
    assert [invited.process.wait(), met.process.wait()] == [-9, -9]
    assert time.monotonic() - began < SECONDS  # three meetings, of which two were given up
    sender.publish([first], 2)  # over the same group
    assert_all_arrived(first.weights)
    assert publication.ends == []
    given_up = [answer["error"] for answer in first.answered if "error" in answer]
    assert len(given_up) == 2
    assert all("died or failed meanwhile" in sentence for sentence in given_up)


def test_rank_0_and_the_others_survive_a_death_in_a_broadcast(start: Callable[..., list[Engine]]) -> None:
    first, second, dying = start("never", "never", "bucket")
    publication = Publication(make_link, recipients=Processes)  # type: ignore[arg-type]
    sender: Any = publication.sender
    began = time.monotonic()
    sender.publish([first, second, dying], 1)
    assert time.monotonic() - began < SECONDS
    assert dying.process.wait() == -9
    for engine in (first, second):
        assert [len(engine.messages), sum("bytes" in answer for answer in engine.answered)] == [2 + 3, 2 + 3]
        assert_all_arrived(engine.weights)
    freed = [answer["given_up"] for engine in (first, second) for answer in engine.answered if "given_up" in answer]
    assert freed
    assert set(freed) == {"a rollout worker died or failed"}
    sender.publish([first, second], 2)  # over the group that was formed anew
    assert_all_arrived(first.weights)
    assert publication.ends == []


HOLD_A_STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("there", flush=True)
time.sleep(60)
"""


def test_an_engine_does_not_wait_for_a_learner_that_died_while_they_joined() -> None:
    port = free_port()
    command = [sys.executable, "-c", HOLD_A_STORE, str(port)]
    looks: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as learner:
        assert learner.stdout is not None
        assert learner.stdout.readline() == "there\n"

        def kill_at_the_third_look() -> bool:
            looks.append(time.monotonic())
            if len(looks) == 3:
                learner.kill()
            return False

        meeting = Meeting(HOST, port, world_size=3, rank=1)
        with pytest.raises(WeightSyncError, match="the group of 3 ranks that weights pass through did not form"):
            meeting.form(GlooJoin(), kill_at_the_third_look)
    assert time.monotonic() - looks[0] < 10
