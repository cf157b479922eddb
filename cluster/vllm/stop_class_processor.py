"""Merges stop ids inside vLLM, by logits processors that work before temperature, penalties aside.

A request turns this on by an entry of `SamplingParams.extra_args` that `request_merging` makes; others keep their
logits. vLLM has two model runners, each with its own interface for logits processors: V1 serves on CPU, V2 on GPU.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from cluster.models.stop_class import merge_logits
from cluster.vllm.compat import LogitsContext, LogitsProcessorV2, LogitsProcRequestState

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ENTRY = "preceptor_stop_class"


def request_merging(stop_class: Sequence[int]) -> dict[str, Any]:
    """Return the `extra_args` of a request whose ids of the class count as one; all of an engine have the same class.

    Example:
        >>> request_merging((2, 7))
        {'preceptor_stop_class': [2, 7]}
    """
    return {ENTRY: list(stop_class)}


class StopClassProcessor(LogitsProcessor):
    """Merges stop ids under vLLM's model runner V1."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, list[int]] = {}  # from place in the batch to the request's class

    def is_argmax_invariant(self) -> bool:
        """Return False: the class may be the most likely token where none of its ids is."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, lambda params, _prompt, _sampled: class_in(params))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return _merged(logits, self._requests)


class StopClassProcessorV2(LogitsProcessorV2):
    """Merges stop ids under vLLM's model runner V2."""

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        self._slots: dict[int, list[int]] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over a slot; return whether vLLM shall pass the request's logits."""
        stop_class = class_in(sampling_params)
        self._slots.pop(req_idx, None)
        if stop_class is not None:
            self._slots[req_idx] = stop_class
        return stop_class is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots = enumerate(ctx.idx_mapping_np.tolist())
        return _merged(logits, {row: self._slots[slot] for row, slot in slots if slot in self._slots})


def class_in(params: SamplingParams) -> list[int] | None:
    entry: list[int] | None = (params.extra_args or {}).get(ENTRY)
    return entry


def _merged(logits: torch.Tensor, classes: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """Merge in the rows that have a class, [n, vocabulary]."""
    if not classes:
        return logits
    stop_class, rows = next(iter(classes.values())), None
    if len(classes) < len(logits):
        rows = torch.tensor([row in classes for row in range(len(logits))]).to(logits.device, non_blocking=True)
    merge_logits(logits, stop_class, rows)
    return logits
