"""Conducts one update of rollout engines from GPU to GPU, and brings those that live through the death of one."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import Tensor

from cluster.contracts.errors import ActorDiedError, ActorError, PreceptorError, WeightSyncError
from cluster.weight_sync.manifest import Bucket
from learner.weight_sync.gpu_links import Link
from learner.weight_sync.recipients import Recipients

CHECK_SECONDS = 1.0  # how long NCCL may wait for the workers before their answers are read
CARRY_SHARE = (
    0.5  # of the time in which the learner must answer: what is wrong is to be said before the driver gives up
)
FREE_SECONDS = 60.0  # for what waits on the GPUs to end when their group is broken off, and for a bucket to be loaded

_log = logging.getLogger("preceptor")


class GpuUpdate:
    """Conducts one update from rank 0: announces every bucket to the workers, then carries it.

    The link waits for the workers in `thread`, while this one polls their answers for errors. A worker that dies in a
    broadcast breaks the group: everyone leaves it, and the rest of the update is left to another. Where the GPU stays
    blocked even so, `end_process` ends this rank for good.
    """

    def __init__(
        self,
        link: Link,
        recipients: Recipients,
        thread: ThreadPoolExecutor,
        end_process: Callable[[int], Any],
        timeout_seconds: float,
    ) -> None:
        self._link, self._recipients, self._thread, self._end_process = link, recipients, thread, end_process
        self._timeout_seconds = timeout_seconds
        self._receiving: dict[int, Any] = {}  # worker -> reference
        self._num_workers = 0
        self.paused = time.perf_counter()  # when generation stopped
        self.is_broken = False
        self._failure: RuntimeError | None = None  # of NCCL, which may hear of a death before Ray does

    def start(self) -> list[ActorHandle]:
        """Pause the workers, and return those that live."""
        self._ask("start_weight_update", ())
        return self.living()

    def living(self) -> list[ActorHandle]:
        """Return the workers that live; from now on, the death of one of them breaks the group."""
        self._num_workers = len(self._recipients.workers)
        return list(self._recipients.workers.values())

    def connect(self) -> bool:
        """Open both ends at once, for each waits for the others; return False if a worker died meanwhile.

        Raises:
            WeightSyncError: the ends do not meet, though all workers live; a worker's own error, where it has one.
        """
        invitations = self._link.invite(self._num_workers)
        called = self._recipients.call(
            "init_weight_transfer", dict(zip(self._recipients.workers, invitations, strict=True))
        )
        opening = self._thread.submit(_on_this_stream(self._link.open))
        failure: BaseException | None = None
        while not wait([opening], CHECK_SECONDS).done:
            try:
                self._recipients.poll(called)
            except (PreceptorError, RayError) as error:
                failure = failure or error
                self._link.give_up()
        # Those that live fail too when one has died.
        of_worker = self._recipients.first_error(called, "open the weight transfer")
        failure = failure or opening.exception() or of_worker
        if len(self._recipients.workers) < self._num_workers:
            _log.warning("a rollout worker died while the group for weights formed; the others form another")
            return False
        if failure is not None:
            raise failure
        return True

    def send(self, bucket: Bucket, values: Tensor) -> None:
        """Let the workers receive what lies in the buffer; with NCCL they load it while the next bucket is made."""
        self.settle()
        if self.is_broken or not self._recipients.workers:
            return
        message = self._link.update_message(bucket)
        self._receiving = self._recipients.call("update_weights", dict.fromkeys(self._recipients.workers, message))
        self._carry(values)
        if self._link.is_read_in_place:
            self.settle()

    def settle(self) -> None:
        """Wait until every worker has the last bucket."""
        receiving, self._receiving = self._receiving, {}
        try:
            self._recipients.answers(receiving, "receive a bucket of weights", on_death=self._break_off)
        except ActorError:
            if not self.is_broken:
                raise
            self._end()  # the GPUs of those that live wait for the dead one
        if self._failure is not None and len(self._recipients.workers) == self._num_workers:
            raise WeightSyncError(f"NCCL failed while weights were sent: {self._failure}") from self._failure

    def finish(self, policy_version: int) -> float:
        """Wait until every worker runs on the new weights; return the seconds of generation's pause."""
        self._ask("finish_weight_update", policy_version)
        return time.perf_counter() - self.paused

    def _ask(self, verb: str, argument: Any) -> None:
        answers = self._recipients.call(verb, dict.fromkeys(self._recipients.workers, argument))
        self._recipients.answers(answers, f"answer {verb}")

    def _carry(self, values: Tensor) -> None:
        """Let the link wait for the workers, as NCCL does for ever, and poll their answers for errors meanwhile.

        Raises:
            WeightSyncError: all workers live, and were not there in time; or a worker's own error.
        """
        carrying = self._thread.submit(_on_this_stream(lambda: self._link.carry(values)))
        limit = CARRY_SHARE * self._timeout_seconds
        deadline = time.monotonic() + limit
        while not wait([carrying], CHECK_SECONDS).done:
            try:
                self._recipients.poll(self._receiving)
            except ActorDiedError:
                self._break_off()
                if not wait([carrying], FREE_SECONDS).done:
                    self._end()
                return
            except (PreceptorError, RayError):
                self._link.break_off("a rollout worker failed")
                raise
            if time.monotonic() > deadline:
                self._link.break_off("a broadcast took too long")
                raise WeightSyncError(
                    f"a bucket of weights did not reach all rollout workers within {limit:g} s, though "
                    "none of them died; look at the network between the nodes (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO), "
                    'raise ray.call_timeout_seconds, or set weight_sync.transport = "object_store"'
                )
        try:
            carrying.result()
        except RuntimeError as error:
            self._failure = error
            self._break_off()

    def _break_off(self) -> float | None:
        """Free this GPU and those of the living workers from a rank that is gone; NCCL would wait for ever.

        Return the seconds in which those must answer then; None: no group holds them.
        """
        if self._link.is_read_in_place:
            return None
        if not self.is_broken:
            _log.warning("the group for weights broke while they were sent; workers that live get all of them again")
            self.is_broken = True
            self._link.break_off("a rollout worker died or failed")
        return FREE_SECONDS

    def _end(self) -> None:
        _log.error("a rollout worker died while weights were sent to it, and NCCL does not let go of the GPU")
        self._end_process(1)  # only that frees it; the driver goes back to the last checkpoint with new processes


def _on_this_stream(act: Callable[[], None]) -> Callable[[], None]:
    """Return what another thread can do for this one: each thread has a current stream of its own."""
    if not torch.cuda.is_available():
        return act
    stream = torch.cuda.current_stream()

    def act_there() -> None:
        with torch.cuda.stream(stream):
            act()

    return act_there
