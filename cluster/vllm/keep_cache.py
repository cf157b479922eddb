"""Lets running requests keep their keys and values when an engine's weights change, for `rollout.keep_cache_on_update`.

vLLM itself has two ways: it drops all caches, so that every running request is read again from its first token, or it
keeps them all, so that new prompts may share blocks that old weights have computed. These schedulers keep the blocks of
what runs, and give every other request a salt, which makes it share blocks with requests of the same salt alone.
Importing this imports vLLM, which looks its schedulers up by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus


class KeepsRunning:
    """Adds to a scheduler of vLLM's that a reset of the caches leaves those of running requests.

    A request that vLLM preempts later is read again under the weights of that time, as it would be without this.
    """

    requests: Mapping[str, Request]
    running: Sequence[Request]
    _num_updates = 0  # that came while something ran

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Drop the caches if nothing runs; else let no request that has not begun share what there is of them."""
        if not self.running:
            vllms: Any = super()
            return bool(vllms.reset_prefix_cache(reset_running_requests, reset_connector))
        self._num_updates += 1
        for request in self.requests.values():
            if request.status != RequestStatus.RUNNING:
                self._set_apart(request)
        return True

    def add_request(self, request: Request) -> None:
        self._set_apart(request)
        vllms: Any = super()
        vllms.add_request(request)

    def _set_apart(self, request: Request) -> None:
        if self._num_updates:
            request.cache_salt = str(self._num_updates)
            request.block_hashes.clear()
            request.update_block_hashes()


class KeepingScheduler(KeepsRunning, Scheduler):
    """Schedules as vLLM's default does on a CPU."""


class KeepingAsyncScheduler(KeepsRunning, AsyncScheduler):
    """Schedules one step ahead of the GPU, as vLLM's default does there."""
