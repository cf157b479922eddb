"""A rollout engine that is killed while the group for weights forms, or in a broadcast, costs nobody else.

Real processes, over gloo, which waits as NCCL does.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from torch import Tensor

from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.joint_group import Meeting
from learner.weight_sync.gpu_links import NcclLink
from tests.learner.weight_sync.engine_processes import SECONDS, Engine, Processes, free_port
from tests.learner.weight_sync.fake_gpus import BUCKET_BYTES, Publication, assert_all_arrived
from tests.learner.weight_sync.gloo_group import HOST, GlooJoin


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
