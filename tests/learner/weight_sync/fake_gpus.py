"""Stand-ins for what a sync from GPU to GPU needs: an engine, NCCL, rollout actors, and vLLM's receiving end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import ActorDiedError
from cluster.weight_sync.joint_group import Meeting
from cluster.weight_sync.manifest import Bucket, Manifest, TensorSpec
from learner.weight_sync.gpu_links import IpcLink, NcclLink
from learner.weight_sync.gpu_sender import VllmSender

PARAMETERS = {
    "embed.weight": torch.arange(24.0).view(6, 4),  # 48 bytes in bfloat16: more than a bucket
    "norm.weight": torch.tensor([0.5, -1.0, 2.0]),
    "proj.weight": torch.arange(8.0).view(2, 4),
    "scale": torch.tensor([3.0]),
}
BUCKET_BYTES = 22


class FakeStudent:
    def manifest(self, dtype: str) -> Manifest:
        return [TensorSpec(name, tuple(v.shape), dtype) for name, v in PARAMETERS.items()]


class FakeEngine:
    """Gathers parameters, and notes which ones at a time."""

    world_size = 1

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.student = rank, FakeStudent()
        self.gathered: list[list[str]] = []

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        self.gathered.append(list(names))
        yield {name: PARAMETERS[name] for name in names}


class FakeGroup:
    """Stands for NCCL: hands what is broadcast to every receiver."""

    disabled = False

    def __init__(self) -> None:
        self.broadcasts: list[Tensor] = []
        self.is_destroyed = False

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        assert src == 0
        self.broadcasts.append(tensor.clone())

    def destroy(self) -> None:
        self.is_destroyed = True


class FakeRecipients:
    """Stands for rollout actors: notes what each receives; those in `crashing` are gone at the nth call of a verb."""

    def __init__(self, workers: Sequence[str], crashing: Mapping[str, tuple[str, int]]) -> None:
        self.workers = dict(enumerate(workers))
        self.calls: list[tuple[str, dict[int, Any]]] = []
        self._crashing = crashing

    def call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        self.calls.append((method, {position: arguments[position] for position in self.workers}))
        calls = sum(verb == method for verb, _ in self.calls)
        return {position: self._crashing.get(worker) == (method, calls) for position, worker in self.workers.items()}

    def answers(
        self, references: Mapping[int, Any], what_for: str, on_death: Callable[[], float | None] = lambda: None
    ) -> dict[int, Any]:
        if any(references.values()):
            on_death()
        self.workers = {p: w for p, w in self.workers.items() if not references.get(p, False)}
        return dict.fromkeys(self.workers)

    def poll(self, references: Mapping[int, Any]) -> None:
        if any(references.values()):
            raise ActorDiedError("a rollout worker died")

    def first_error(self, references: Mapping[int, Any], what_for: str) -> Exception | None:
        self.answers(references, what_for)
        return None

    def messages(self, method: str) -> list[dict[int, Any]]:
        return [arguments for verb, arguments in self.calls if verb == method]


class FakeNewcomers:
    """Stands for the way through the object store: notes who came, and what was sent to them."""

    def __init__(self, workers: Sequence[str], policy_version: int, timeout_seconds: float) -> None:
        self.workers, self.policy_version, self.is_finished = list(workers), policy_version, False
        self.sent: list[tuple[Bucket, Tensor]] = []

    def send(self, bucket: Bucket, values: Tensor) -> None:
        self.sent.append((bucket, values.clone()))

    def finish(self) -> None:
        self.is_finished = True


class Publication:
    """A sender over fakes, and what became of its publications."""

    def __init__(
        self,
        make_link: Callable[[Tensor], Any],
        crashing: Mapping[str, tuple[str, int]] | None = None,
        recipients: type[FakeRecipients] = FakeRecipients,
        end: Callable[[int], Any] | None = None,
        engines_sleep: bool = False,
        agree: Callable[[bool], list[bool]] = lambda value: [value],
    ) -> None:
        self.engine = FakeEngine()
        self.all_recipients: list[FakeRecipients] = []
        self.ends: list[int] = []
        self.newcomers: list[FakeNewcomers] = []

        def listen(workers: Sequence[Any], timeout_seconds: float) -> Any:
            self.all_recipients.append(recipients(workers, crashing or {}))
            return self.all_recipients[-1]

        def bring(workers: Sequence[Any], policy_version: int, timeout_seconds: float) -> Any:
            self.newcomers.append(FakeNewcomers(workers, policy_version, timeout_seconds))
            return self.newcomers[-1]

        config = WeightSyncConfig(bucket_bytes=BUCKET_BYTES)
        engine: Any = self.engine
        end = end or self.ends.append
        self.sender = VllmSender(engine, config, "bfloat16", 1.0, make_link, listen, bring, end, engines_sleep, agree)

    def publish(self, *workers: str, version: int = 1) -> Any:
        return self.sender.publish(list(workers), version)


def nccl(groups: list[FakeGroup], tensor_parallel: int = 1, is_sender: bool = True) -> Callable[[Tensor], NcclLink]:
    ports = iter(range(5000, 6000))

    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        groups.append(FakeGroup())
        return groups[-1]

    return lambda buffer: NcclLink(
        is_sender, lambda: ("10.0.0.1", next(ports)), tensor_parallel, max(BUCKET_BYTES, buffer.numel()), join
    )


def received(messages: Sequence[Mapping[str, Any]], payloads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Read payloads as vLLM's receiving end does."""
    found: dict[str, Tensor] = {}
    for message, payload in zip(messages, payloads, strict=True):
        dtypes = [getattr(torch, name) for name in message["dtype_names"]]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(message["shapes"], dtypes, strict=True)
        ]
        found |= dict(unpack_tensor(payload, message["names"], message["shapes"], dtypes, sizes))
    return found


def assert_all_arrived(found: Mapping[str, Tensor]) -> None:
    assert list(found) == list(PARAMETERS)
    for name, value in PARAMETERS.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value.to(torch.bfloat16))


def in_place(handles: Mapping[str, Any]) -> IpcLink:
    [(gpu, handle)] = handles.items()
    return IpcLink(torch.empty(0), gpu, lambda value: [value], lambda: None, lambda buffer: handle)
