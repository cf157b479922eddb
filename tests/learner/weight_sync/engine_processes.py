"""Rollout engines in processes of their own, as far as a sync of weights knows them; they run `gloo_group.py`."""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.errors import ActorDiedError, WeightSyncError
from tests.learner.weight_sync.fake_gpus import received
from tests.learner.weight_sync.gloo_group import HOST

SECONDS = 30.0  # for an answer


class Engine:
    """A rollout engine in a process of its own, on a CPU or on a GPU of that number."""

    def __init__(self, dies_when: str, gpu: int | None = None) -> None:
        backend, shown = ("gloo", {}) if gpu is None else ("nccl", {"CUDA_VISIBLE_DEVICES": str(gpu)})
        command = [sys.executable, "-m", "tests.learner.weight_sync.gloo_group", dies_when, backend]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env={**os.environ, **shown}, **pipes)
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
        self, references: Mapping[int, Engine], what_for: str, on_death: Callable[[], float | None] = lambda: None
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
