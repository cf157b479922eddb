"""Samples further candidates inside vLLM, by logits processors that see every decoding step, and fetches them.

A request turns this on by an entry of `SamplingParams.extra_args` that `request_candidates` makes. No logit changes.
vLLM has two model runners, each with an interface of its own for logits processors: V1 serves on CPU, V2 on GPU.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from cluster.contracts.trajectory import Floats, Ints
from cluster.vllm.compat import LogitsContext, LogitsProcessorV2, LogitsProcRequestState
from rollout_workers.candidates.sampled import CandidateLog, CandidateRequest, LogitsRow, SampledCandidates

if TYPE_CHECKING:
    from vllm.config import VllmConfig


Encoded = tuple[bytes, bytes]  # as CandidateCalls.take_candidates returns them
NOTHING: Encoded = (b"", b"")  # of a request that the worker does not know
Call = Callable[[Mapping[str, int], list[str]], Awaitable[Mapping[str, Encoded]]]


class CandidateFetcher:
    """Collects what is wanted while a call is under way, and asks for all of it with the next one."""

    def __init__(self, call: Call) -> None:
        """Take the way to the worker: from wanted keys with their number of tokens, and keys to forget, to draws."""
        self._call = call
        self._wanted: dict[str, int] = {}
        self._given_up: list[str] = []
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Mapping[str, Encoded]] | None = None

    def give_up(self, key: str) -> None:
        """Let the worker forget a request with the next call."""
        self._given_up.append(key)

    async def fetch(self, key: str, num_tokens: int) -> Encoded:
        """Return a request's draws, once; a caller that is cancelled takes nothing from the others."""
        self._wanted[key] = num_tokens
        if self._next is None:
            self._next = asyncio.create_task(self._fetch_wanted())
        return (await asyncio.shield(self._next)).get(key, NOTHING)

    async def _fetch_wanted(self) -> Mapping[str, Encoded]:
        async with self._turn:
            wanted, given_up = self._wanted, self._given_up
            self._wanted, self._given_up, self._next = {}, [], None
            return await self._call(wanted, given_up)


ENTRY = "preceptor_draws"


def request_candidates(order: CandidateRequest) -> dict[str, Any]:
    """Return the `extra_args` of a request that wants draws."""
    return {ENTRY: [order.key, order.count, order.seed]}


class CandidateProcessor(LogitsProcessor):
    """Draws under vLLM's model runner V1."""

    validate_params = classmethod(lambda cls, params: check_params(params))

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self.log = CandidateLog()
        # From place in the batch to the request's draws and its written tokens, a list that vLLM keeps up to date.
        self._requests: dict[int, tuple[SampledCandidates, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Say so, that vLLM shows logits after penalties and temperature, from which it draws the written token."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which request stands where; one that is computed anew comes back with the tokens it has written."""
        process_dict_updates(self._requests, batch_update, self._new_request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw for the requests that asked."""
        if self._requests:
            rows = [
                LogitsRow(draws, index, len(written), temperature=1.0)
                for index, (draws, written) in self._requests.items()
            ]
            self.log.record(rows, logits)
        return logits

    def _new_request(
        self, params: SamplingParams, prompt_ids: list[int] | None, written: list[int]
    ) -> tuple[SampledCandidates, list[int]] | None:
        order = order_of(params)
        return None if order is None else (self.log.open(order), written)


class CandidateProcessorV2(LogitsProcessorV2):
    """Draws under vLLM's model runner V2."""

    validate_params = classmethod(lambda cls, params: check_params(params))

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        self.log = CandidateLog()
        self._states = req_states
        self._requests: dict[int, tuple[SampledCandidates, float]] = {}  # from slot to draws and temperature

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over a slot; return whether the request's logits are to be shown."""
        order = order_of(sampling_params)
        self._requests.pop(req_idx, None)
        if order is not None:
            self._requests[req_idx] = (self.log.open(order), sampling_params.temperature)
        return order is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Draw for the requests that asked and whose prompt is complete; here logits come before the temperature."""
        rows = []
        for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
            seen_tokens = int(ctx.seq_lens_upper_bound_np[index])
            if slot in self._requests and seen_tokens >= self._states.prefill_len.np[slot]:
                draws, temperature = self._requests[slot]
                rows.append(LogitsRow(draws, index, seen_tokens - int(self._states.prompt_len.np[slot]), temperature))
        if rows:
            self.log.record(rows, logits)
        return logits


class CandidateCalls:
    """Adds `take_candidates` to vLLM's worker class, for `collective_rpc` to make by name."""

    model_runner: Any
    use_v2_model_runner: bool

    def take_candidates(self, wanted: Mapping[str, int], given_up: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """Return finished requests' ids and log-probabilities, as `candidates_from_bytes` reads them, and forget them.

        Bytes, because vLLM passes no arrays between processes unless it is told to unpickle what comes.

        Args:
            wanted: from key to the number of tokens that were kept.
            given_up: keys of requests whose draws nobody wants.
        """
        log = self._draw_log()
        log.drop(given_up)
        taken = {key: log.take(key, num_tokens) for key, num_tokens in wanted.items()}
        return {key: (draws[0].tobytes(), draws[1].tobytes()) for key, draws in taken.items() if draws}

    def _draw_log(self) -> CandidateLog:
        runner = self.model_runner
        processors = (
            runner.sampler.logits_processors if self.use_v2_model_runner else runner.input_batch.logitsprocs.all
        )
        [ours] = [one for one in processors if isinstance(one, CandidateProcessor | CandidateProcessorV2)]
        return ours.log


def candidates_from_bytes(ids: bytes, logprobs: bytes, count: int) -> tuple[Ints, Floats]:
    """Return [tokens, count] each."""
    return np.frombuffer(ids, np.int32).reshape(-1, count), np.frombuffer(logprobs, np.float32).reshape(-1, count)


def order_of(params: SamplingParams) -> CandidateRequest | None:
    """Return what a request asked for."""
    asked = (params.extra_args or {}).get(ENTRY)
    return None if asked is None else CandidateRequest(*asked)


def check_params(params: SamplingParams) -> None:
    """Refuse what would make draws come from another distribution than the written token.

    Raises:
        ValueError: the request is greedy, or truncates the distribution.
    """
    if order_of(params) is None:
        return
    if params.temperature == 0 or params.top_p != 1 or params.top_k > 0 or params.min_p > 0:
        raise ValueError(
            "draws come from the whole distribution, so they need temperature above 0, top_p = 1, top_k = 0 and "
            f"min_p = 0; found {params.temperature}, {params.top_p}, {params.top_k} and {params.min_p}"
        )
