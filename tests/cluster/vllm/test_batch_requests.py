"""A batch of rows is one request and one answer: our scheduler, with a stand-in for the model."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.contracts.columns import Ragged
from cluster.models.token_scores import Layout
from cluster.vllm.token_scoring import batch_request, unpack_answer
from tests.cluster.vllm.schedulers import BLOCK, make_scheduler

SCHEDULERS = ("BatchScheduler", "BatchAsyncScheduler")


def column(rows: list[list[int]]) -> Ragged:
    return Ragged(np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)]))


class Engine:
    """Answers a position with its number and the id that it is to score, if it was computed."""

    def __init__(self, model: Path, scheduler: str) -> None:
        name = f"cluster.vllm.batch_requests.{scheduler}"
        self.scheduler, self._hasher = make_scheduler(
            model, name, runner="pooling", convert="embed", enable_chunked_prefill=False
        )
        self.computed: Counter[str] = Counter()  # tokens of each request that was scheduled
        self._running: dict[str, Any] = {}  # what each one asks

    def add(self, name: str, rows: list[tuple[list[int], list[int]]]) -> None:
        """Ask for the scores of rows, as their token ids and positions."""
        positions = column([places for _, places in rows])
        ids = np.array([[tokens[place + 1]] for tokens, places in rows for place in places])
        asked = batch_request(column([tokens for tokens, _ in rows]), positions, ids, Layout())
        self.add_request(name, [0], asked)

    def add_request(self, name: str, prompt: list[int], asked: dict[str, Any] | None) -> None:
        from vllm import PoolingParams
        from vllm.v1.request import Request

        params = PoolingParams(task="token_embed", extra_kwargs=asked)
        self.scheduler.add_request(Request(name, prompt, None, params, block_hasher=self._hasher))

    def step(self) -> dict[str, Any]:
        """Run one step, and return the outputs that leave the engine."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled = self.scheduler.schedule()
        computed: dict[str, int] = dict(scheduled.num_scheduled_tokens)
        self.computed.update(computed)
        for request in scheduled.scheduled_new_reqs:
            self._running[request.req_id] = request
        records = [self._records(self._running[name]) for name in computed]
        order = {name: index for index, name in enumerate(computed)}
        outputs = self.scheduler.update_from_output(
            scheduled, ModelRunnerOutput(list(computed), order, pooler_output=records)
        )
        return {output.request_id: output for of_client in outputs.values() for output in of_client.outputs}

    def run(self, *names: str) -> dict[str, Any]:
        """Return all outputs until there are those of some requests."""
        outputs: dict[str, Any] = {}
        for _ in range(20):
            outputs |= self.step()
            if outputs.keys() >= set(names):
                return outputs
        raise AssertionError(f"no answer to {set(names) - outputs.keys()}")

    def _records(self, request: Any) -> torch.Tensor:
        asked = request.pooling_params.extra_kwargs
        if asked is None:
            return torch.zeros(len(request.prompt_token_ids), 4)
        if asked["positions"][0] < request.num_computed_tokens:  # the cached ones
            return torch.empty(0, 8, dtype=torch.uint8)
        pairs = np.stack([asked["positions"], asked["ids"][:, 0]], axis=1).astype(np.int32)
        return torch.from_numpy(pairs).view(torch.uint8)


def answered(output: Any, num_rows: int) -> tuple[list[list[list[int]]], int]:
    """Return the records of each row, and the number of cached positions."""
    records, num_cached = unpack_answer(output.pooling_output.numpy(), num_rows)
    return [records[row].copy().view(np.int32).tolist() for row in range(num_rows)], num_cached


def tokens(seed: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(4, 112, count).tolist()
    return drawn


@pytest.fixture(params=SCHEDULERS)
def engine(tiny_student: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine(tiny_student, request.param)


def test_a_batch_is_answered_once_and_in_the_order_of_its_rows(engine: Engine) -> None:
    """Two rows run at once, so the five rows and the two requests take four steps."""
    rows = [(tokens(seed, 5 + 3 * seed), [seed, 3 + seed]) for seed in range(4)]
    engine.add("batch", rows)
    engine.add_request("plain", tokens(9, 6), None)
    engine.add("other", [(tokens(8, 9), [4])])
    steps = [engine.step() for _ in range(3)]
    assert [sorted(outputs) for outputs in steps] == [[], ["batch"], ["other", "plain"]]
    expected = [[[place, ids[place + 1]] for place in places] for ids, places in rows]
    assert answered(steps[1]["batch"], 4) == (expected, 0)
    assert steps[1]["batch"].finished
    assert steps[2]["plain"].pooling_output.shape == (6, 4)
    assert not engine.scheduler.has_unfinished_requests()


def test_rows_share_the_blocks_of_their_prompt(engine: Engine) -> None:
    prompt = tokens(0, 2 * BLOCK + 3)
    rows = [(prompt + tokens(seed, 4), [len(prompt) - 1, len(prompt)]) for seed in (1, 2, 3)]
    engine.add("batch", rows)
    records, num_cached = answered(engine.run("batch")["batch"], 3)
    assert num_cached == 2 * 2 * BLOCK
    assert sum(engine.computed.values()) == 3 * len(rows[0][0]) - num_cached
    assert records == [[[place, ids[place + 1]] for place in places] for ids, places in rows]


@pytest.mark.parametrize("prompt_tokens", [BLOCK, BLOCK - 4], ids=["prompt-ends-with-block", "completions-alike"])
def test_a_row_whose_completion_was_cached_is_read_whole(engine: Engine, prompt_tokens: int) -> None:
    """The prompt and what the completions begin with fill one block. The last row is read before those, once."""
    start = tokens(0, BLOCK + 6)
    rows = [(start + tokens(seed, 3), [prompt_tokens - 1, BLOCK + 2]) for seed in (1, 2, 3)]
    rows.append((tokens(4, 9), [4, 7]))
    engine.add("batch", rows)
    records, num_cached = answered(engine.run("batch")["batch"], 4)
    assert records == [[[place, ids[place + 1]] for place in places] for ids, places in rows]
    assert num_cached == 0


def test_a_batch_that_is_given_up_leaves_nothing_behind_and_others_go_on(engine: Engine) -> None:
    from vllm.v1.request import RequestStatus

    from cluster.vllm.compat import name_of

    for name in ("first", "second"):
        engine.add(name, [(tokens(seed, 8), [5]) for seed in range(3)])
    assert engine.step() == {}
    finished = engine.scheduler.finish_requests(["first"], RequestStatus.FINISHED_ABORTED)
    assert [name_of(one) for one in finished] == ["first"]
    assert engine.scheduler.get_num_unfinished_requests() == 3
    assert list(engine.run("second")) == ["second"]
    engine.add("third", [(tokens(0, 8), [5])])
    finished = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert [name_of(one) for one in finished] == ["third"]
    assert not engine.scheduler.has_unfinished_requests()
