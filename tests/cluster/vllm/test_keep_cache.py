"""What happens to requests and caches when weights change: vLLM's own scheduler, with a stand-in for the model."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.vllm.schedulers import BLOCK, make_scheduler

AT_ONCE = 32  # tokens of a step
PROMPT = [5 + index % 50 for index in range(3 * BLOCK + 2)]
SAMPLED = 7


class Engine:
    """Schedules requests, two at a time, and samples the same token for all of them."""

    def __init__(self, model: Path, name: str) -> None:
        self.scheduler, self._hasher = make_scheduler(
            model, name, max_num_batched_tokens=AT_ONCE, enable_chunked_prefill=True
        )
        self.computed: Counter[str] = Counter()  # tokens of each request

    def add(self, name: str, prompt: list[int]) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        request = Request(name, prompt, SamplingParams(max_tokens=100), None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> dict[str, int]:
        """Run one step, and return how many tokens it computed of each request."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled = self.scheduler.schedule()
        computed: dict[str, int] = dict(scheduled.num_scheduled_tokens)
        self.computed.update(computed)
        requests = self.scheduler.requests
        done = [requests[name].num_computed_tokens >= requests[name].num_tokens for name in computed]
        tokens = [[SAMPLED] if is_done else [] for is_done in done]
        order = {name: index for index, name in enumerate(computed)}
        self.scheduler.update_from_output(scheduled, ModelRunnerOutput(list(computed), order, tokens))
        return computed

    def run_until_sampled(self, request: Any, count: int) -> int:
        """Return how many tokens were computed of the request until it had so many of its own."""
        for _ in range(50):
            if request.num_output_tokens >= count:
                return self.computed[request.request_id]
            self.step()
        raise AssertionError("the request does not come to its tokens")

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def change_weights(self) -> None:
        """Do as vLLM does when it was paused with `clear_cache=True`."""
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)


KEEPING, VLLMS = "cluster.vllm.keep_cache.KeepingScheduler", "vllm.v1.core.sched.scheduler.Scheduler"


@pytest.mark.parametrize(("scheduler", "read_again"), [(KEEPING, 0), (VLLMS, len(PROMPT) + 4)])
def test_a_running_request_is_read_again_after_an_update_unless_it_keeps_its_cache(
    tiny_student: Path, scheduler: str, read_again: int
) -> None:
    engine = Engine(tiny_student, scheduler)
    engine.run_until_sampled(request := engine.add("running", PROMPT), count=5)
    engine.change_weights()
    steps = [engine.step()["running"] for _ in range(4)]
    # The fifth token has been sampled and not yet read; each step reads at least one.
    assert sum(steps) - request.num_output_tokens + 5 == read_again


WHOLE, REST = len(PROMPT), len(PROMPT) - 3 * BLOCK  # tokens to read without the blocks of others, and with


def test_a_new_prompt_shares_no_block_that_the_old_weights_computed(tiny_student: Path) -> None:
    engine = Engine(tiny_student, KEEPING)
    engine.run_until_sampled(engine.add("running", PROMPT), count=2)
    assert engine.run_until_sampled(engine.add("before", PROMPT), count=1) == REST
    engine.abort("before")
    engine.change_weights()
    assert engine.run_until_sampled(engine.add("after", PROMPT), count=1) == WHOLE
    engine.abort("after")
    assert engine.run_until_sampled(engine.add("mate", PROMPT), count=1) == REST  # shared with "after"


def test_a_request_that_waited_for_the_update_shares_no_old_block_either(tiny_student: Path) -> None:
    engine = Engine(tiny_student, KEEPING)
    for name in ("one", "two"):
        engine.run_until_sampled(engine.add(name, PROMPT), count=1)
    waiting = engine.add("waiting", PROMPT)
    assert "waiting" not in engine.step()  # two run
    engine.change_weights()
    engine.abort("one")
    assert engine.run_until_sampled(waiting, count=1) == WHOLE


def test_a_prompt_read_half_by_old_weights_is_shared_by_none(tiny_student: Path) -> None:
    engine = Engine(tiny_student, KEEPING)
    engine.add("half", PROMPT)
    assert engine.step() == {"half": AT_ONCE}
    engine.change_weights()
    assert engine.run_until_sampled(engine.add("mate", PROMPT), count=1) == WHOLE


def test_an_update_while_nothing_runs_drops_all_caches(tiny_student: Path) -> None:
    engine = Engine(tiny_student, KEEPING)
    engine.run_until_sampled(engine.add("first", PROMPT), count=1)
    engine.abort("first")
    engine.change_weights()
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert all(block.block_hash is None for block in pool.blocks)


@pytest.mark.parametrize(("is_async", "name"), [(True, "AsyncScheduler"), (False, "Scheduler")])
def test_the_scheduler_is_of_the_kind_that_vllm_would_take(is_async: bool, name: str) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from cluster.vllm.compat import scheduler_name
    from cluster.vllm.engine import BATCH_SCHEDULER, KEEPING_SCHEDULER

    for prefix in (KEEPING_SCHEDULER, BATCH_SCHEDULER):
        kind = resolve_obj_by_qualname(scheduler_name(prefix, is_async))
        assert kind.__mro__[2].__name__ == name
