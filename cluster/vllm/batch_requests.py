"""Lets one request of a scoring engine hold all rows of a batch, and one output all their records.

A request costs vLLM as much, in the process that asks and in the engine's, as reading 10 to 25 tokens of the embedded
teacher (`benchmarks.cases.teacher_scoring`): it is checked, encoded, sent, decoded and answered by itself. These
schedulers take a batch apart inside the engine, where its rows are scheduled as if they had come alone, and answer when
the last of them has been read.

Importing this imports vLLM, which looks its schedulers up by name.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from cluster.vllm.compat import finished_like, name_of
from cluster.vllm.token_scoring import pack_answer, rows_in


@dataclass
class Batch:
    """Collects the records of a request's rows."""

    request: Request  # as it came; it is never scheduled itself
    records: list[Tensor]  # [positions, bytes] of each row, or [0] where they have not come
    num_left: int  # rows
    num_cached: int = 0  # positions


@dataclass
class Row:
    """Says where the records of a scheduled request belong."""

    batch: Batch
    place: int
    request: Request


class TakesBatches:
    """Adds to a scheduler of vLLM's that a request for scores is scheduled row by row, and answered once."""

    cache_config: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        vllms: Any = super()
        vllms.__init__(*arguments, **named)
        self._rows: dict[str, Row] = {}  # by the names of their requests

    def add_request(self, request: Request) -> None:
        """Schedule the rows of a request for scores, or a request of another kind as it is."""
        params = request.pooling_params
        if params is None or params.extra_kwargs is None:
            self._add(request)
            return
        rows = list(rows_in(params.extra_kwargs))
        batch = Batch(request, [torch.empty(0)] * len(rows), len(rows))
        for place, (token_ids, wanted) in enumerate(rows):
            # vLLM computes nothing of cached positions. Where the prompt ends with a block of its cache, the last
            # position of the prompt, which predicts the first sampled token, may be cached.
            may_read_cache = (int(wanted["positions"][0]) + 1) % self.cache_config.block_size != 0
            self._add_row(Row(batch, place, _request_of(batch, f"{place}", token_ids, wanted, may_read_cache)))

    def update_from_output(self, *arguments: Any) -> dict[int, Any]:
        """Return the outputs of other requests, and of the batches whose last row this step has read."""
        vllms: Any = super()
        outputs: dict[int, Any] = vllms.update_from_output(*arguments)
        for of_client in outputs.values():
            answers = map(self._answer, of_client.outputs)
            of_client.outputs = [answer for answer in answers if answer is not None]
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> list[Any]:
        """Give up the rows of batches that are given up; those who asked know the batches alone."""
        asked = {request_ids} if isinstance(request_ids, str) else request_ids and set(request_ids)
        rows = {
            name: self._rows.pop(name)
            for name, row in list(self._rows.items())
            if asked is None or row.batch.request.request_id in asked
        }
        vllms: Any = super()
        finished = vllms.finish_requests(None if asked is None else {*asked, *rows}, finished_status)
        said = [one for one in finished if name_of(one) not in rows]
        for request in {id(row.batch): row.batch.request for row in rows.values()}.values():
            request.status = finished_status
            said.append(finished_like(finished[0], request))
        return said

    def _add(self, request: Request) -> None:
        vllms: Any = super()
        vllms.add_request(request)

    def _add_row(self, row: Row) -> None:
        self._rows[row.request.request_id] = row
        self._add(row.request)

    def _answer(self, output: Any) -> Any | None:
        """Return what is sent of an output: a batch's answer in the place of its last row's, and None before."""
        row = self._rows.pop(output.request_id, None)
        if row is None:
            return output
        batch, records = row.batch, output.pooling_output
        if not len(records):  # another trajectory began with the same completion tokens, and they were cached
            request, wanted = row.request, row.request.pooling_params.extra_kwargs
            again = _request_of(batch, f"{row.place}-whole", request.prompt_token_ids, wanted, may_read_cache=False)
            self._add_row(Row(batch, row.place, again))
            return None
        batch.records[row.place] = records
        batch.num_left -= 1
        batch.num_cached += output.prefill_stats.num_cached_tokens
        if batch.num_left:
            return None
        output.request_id = batch.request.request_id
        output.pooling_output = pack_answer(batch.records, batch.num_cached)
        return output


class BatchScheduler(TakesBatches, Scheduler):
    """Schedules as vLLM's default does on a CPU."""


class BatchAsyncScheduler(TakesBatches, AsyncScheduler):
    """Schedules one step ahead of the GPU, as vLLM's default does there."""


def _request_of(batch: Batch, name: str, token_ids: list[int], wanted: dict[str, Any], may_read_cache: bool) -> Request:
    """Return the request of one row, which comes from the batch's client, at its time."""
    whole = batch.request
    params = copy(whole.pooling_params)
    params.extra_kwargs, params.skip_reading_prefix_cache = wanted, not may_read_cache
    return Request(
        f"{whole.request_id}-{name}",
        token_ids,
        None,
        params,
        client_index=whole.client_index,
        arrival_time=whole.arrival_time,
        priority=whole.priority,
        block_hasher=whole._block_hasher,
    )
