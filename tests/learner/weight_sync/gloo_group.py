"""A group over gloo, in NCCL's place; run as a program, a rollout engine that joins it and receives weights.

The program answers each line of its input with a line. It kills itself where its argument says: "invited", as soon as
it hears of the group; "met", when all ranks are there and join; "bucket", when it is to receive the second one. Its
second argument, "nccl", takes NCCL, and the first GPU.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store

from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.joint_group import Meeting

HOST = "127.0.0.1"


class GlooGroup:
    """The communicator as far as sender and receiver know it.

    It waits as NCCL does, for ever where a rank is gone, and comes back without a word when it is destroyed.
    """

    disabled = False

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = timedelta(seconds=60)
        self._group = ProcessGroupGloo(store, rank, world_size, options)
        self._is_aborted = Event()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> Tensor:
        try:
            self._group.broadcast(tensor, src).wait()
        except RuntimeError:
            self._is_aborted.wait()
        return tensor

    def destroy(self) -> None:
        self._is_aborted.set()


class GlooJoin:
    """Joins as NCCL does: without a limit of our own, and nothing can be aborted before it comes back."""

    def __init__(self, dies: bool = False) -> None:
        self._dies = dies

    def join(self, store: Store, rank: int, world_size: int) -> GlooGroup:
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return GlooGroup(store, rank, world_size)

    def abort(self) -> None:
        pass


def make_join(dies: bool, backend: str) -> Any:
    if backend == "gloo":
        return GlooJoin(dies)
    from cluster.vllm.weight_sync.nccl_and_ipc import NcclJoin

    return NcclJoin()


def main(dies_when: str, backend: str) -> None:
    group: Any = None
    on_gpu = backend == "nccl"
    num_buckets = 0
    for line in sys.stdin:
        verb, argument = json.loads(line)
        answer: dict[str, Any] = {}
        if verb == "init_weight_transfer":
            if dies_when == "invited":
                os.kill(os.getpid(), signal.SIGKILL)
            where = argument["master_address"], argument["master_port"], argument["world_size"]
            meeting = Meeting(*where, argument["rank_offset"])
            try:
                group = meeting.form(make_join(dies_when == "met", backend))
            except WeightSyncError as error:
                answer = {"error": str(error)}
        if verb == "update_weights":
            assert group is not None
            num_buckets += 1
            if dies_when == "bucket" and num_buckets == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            widths = [getattr(torch, name).itemsize for name in argument["dtype_names"]]
            sizes = [torch.Size(shape).numel() for shape in argument["shapes"]]
            num_bytes = sum(size * width for size, width in zip(sizes, widths, strict=True))
            buffer = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
            with meeting.watched(group.destroy) as given_up:
                group.broadcast(buffer, 0, torch.cuda.current_stream() if on_gpu else None)
                answer = {"bytes": buffer.tolist()}  # which waits for the GPU
            answer |= {"given_up": given_up.result()} if given_up.done() else {}
        answer_with(answer)


def answer_with(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    answer_with({})  # it is there
    main(*sys.argv[1:])
