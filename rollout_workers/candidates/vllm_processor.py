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
    """Fetches sampled candidates; requests that finish during one call share the next."""

    def __init__(self, call: Call) -> None:
        """Take the call that gives wanted keys with their number of tokens, and keys to forget, for candidates."""
        self._call = call
        self._wanted: dict[str, int] = {}
        self._given_up: list[str] = []
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Mapping[str, Encoded]] | None = None

    def give_up(self, key: str) -> None:
        """Let the worker forget a request with the next call."""
        self._given_up.append(key)

    async def fetch(self, key: str, num_tokens: int) -> Encoded:
        """Return a request's candidates, once; a caller that is cancelled takes nothing from the others."""
        self._wanted[key] = num_tokens
        if self._next is None:
            self._next = asyncio.create_task(self._fetch_wanted())
        return (await asyncio.shield(self._next)).get(key, NOTHING)

    async def _fetch_wanted(self) -> Mapping[str, Encoded]:
        async with self._turn:
            wanted, given_up = self._wanted, self._given_up
            self._wanted, self._given_up, self._next = {}, [], None
            return await self._call(wanted, given_up)


ENTRY = "preceptor_candidates"


def request_candidates(request: CandidateRequest) -> dict[str, Any]:
    """Return the `extra_args` of a request that wants sampled candidates."""
    return {ENTRY: [request.key, request.count, request.seed]}


class CandidateProcessor(LogitsProcessor):
    """Samples candidates under vLLM's model runner V1."""

    validate_params = classmethod(lambda cls, params: check_params(params))

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self.log = CandidateLog()
        # From place in the batch to the request's candidates and its sampled tokens, a list that vLLM keeps up to date.
        self._requests: dict[int, tuple[SampledCandidates, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """Return True, so that vLLM passes logits after penalties and temperature, from which it samples the token."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which request stands where; one that is computed anew comes back with its sampled tokens."""
        process_dict_updates(self._requests, batch_update, self._new_request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = [
            LogitsRow(candidates, index, len(sampled), temperature=1.0)
            for index, (candidates, sampled) in self._requests.items()
        ]
        self.log.record(rows, logits)
        return logits

    def _new_request(
        self, params: SamplingParams, prompt_ids: list[int] | None, sampled: list[int]
    ) -> tuple[SampledCandidates, list[int]] | None:
        request = request_in(params)
        return None if request is None else (self.log.open(request), sampled)


class CandidateProcessorV2(LogitsProcessorV2):
    """Samples candidates under vLLM's model runner V2."""

    validate_params = classmethod(lambda cls, params: check_params(params))

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        self.log = CandidateLog()
        self._states = req_states
        self._requests: dict[int, tuple[SampledCandidates, float]] = {}  # from slot to candidates and temperature

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over a slot; return whether vLLM shall pass the request's logits."""
        request = request_in(sampling_params)
        self._requests.pop(req_idx, None)
        if request is not None:
            self._requests[req_idx] = (self.log.open(request), sampling_params.temperature)
        return request is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Sample for the requests whose prompt is complete; here logits come before the temperature."""
        rows = []
        for index, slot in enumerate(ctx.idx_mapping_np.tolist()):
            seen_tokens = int(ctx.seq_lens_upper_bound_np[index])
            if slot in self._requests and seen_tokens >= self._states.prefill_len.np[slot]:
                candidates, temperature = self._requests[slot]
                position = seen_tokens - int(self._states.prompt_len.np[slot])
                rows.append(LogitsRow(candidates, index, position, temperature))
        self.log.record(rows, logits)
        return logits


class CandidateCalls:
    """Adds `take_candidates` to vLLM's worker class, for `collective_rpc` to make by name."""

    model_runner: Any
    use_v2_model_runner: bool

    def take_candidates(self, wanted: Mapping[str, int], given_up: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """Return finished requests' ids and log-probabilities, as `candidates_from_bytes` reads them, and forget them.

        Bytes, because vLLM passes arrays between processes only where a setting lets it unpickle what comes. `wanted`
        maps keys to the number of tokens that were kept; requests that were given up ended without a completion.
        """
        runner = self.model_runner
        processors = (
            runner.sampler.logits_processors if self.use_v2_model_runner else runner.input_batch.logitsprocs.all
        )
        [ours] = [one for one in processors if isinstance(one, CandidateProcessor | CandidateProcessorV2)]
        ours.log.drop(given_up)
        taken = {key: ours.log.take(key, num_tokens) for key, num_tokens in wanted.items()}
        return {key: (kept[0].tobytes(), kept[1].tobytes()) for key, kept in taken.items() if kept}


def candidates_from_bytes(ids: bytes, logprobs: bytes, count: int) -> tuple[Ints, Floats]:
    """Return [tokens, count] each."""
    return np.frombuffer(ids, np.int32).reshape(-1, count), np.frombuffer(logprobs, np.float32).reshape(-1, count)


def request_in(params: SamplingParams) -> CandidateRequest | None:
    entry = (params.extra_args or {}).get(ENTRY)
    return None if entry is None else CandidateRequest(*entry)


def check_params(params: SamplingParams) -> None:
    """Refuse by ValueError what would make candidates come from another distribution than the sampled token."""
    is_changed = params.temperature == 0 or params.top_p != 1 or params.top_k > 0 or params.min_p > 0
    if is_changed and request_in(params) is not None:
        raise ValueError(
            "sampled candidates come from the whole distribution, so they need temperature above 0, top_p = 1, "
            f"top_k = 0 and min_p = 0; found {params.temperature}, {params.top_p}, {params.top_k} and {params.min_p}"
        )
