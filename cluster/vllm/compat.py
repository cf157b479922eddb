"""Hides what differs between the vLLM releases that this program runs with, 0.24 to 0.32.

All other files are written as if there were one vLLM. What vLLM has decides, not its version number.
Importing this imports vLLM. `tests/compat/vllm_names.py` lists what is used of vLLM and checks any source tree for it.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
from vllm.distributed.weight_transfer import packed_tensor
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from cluster.contracts.trajectory import Ints

try:
    from vllm.exceptions import VLLMClientError, VLLMError
except ImportError:  # 0.24 has no common class; its errors about requests and models are ValueErrors
    from vllm.exceptions import VLLMValidationError as VLLMClientError

    VLLMError = VLLMClientError

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

    HAS_LOGITS_PROCESSORS_V2 = True
except ImportError:  # 0.24 takes model runner V1 wherever there is a logits processor
    LogitsProcessorV2 = LogitsContext = LogitsProcRequestState = object
    HAS_LOGITS_PROCESSORS_V2 = False

try:
    from vllm.utils.nccl import unpinned_nccl_env
except ImportError:  # 0.24 pins nothing
    unpinned_nccl_env = nullcontext

__all__ = [
    "LogitsContext",
    "LogitsProcRequestState",
    "LogitsProcessorV2",
    "VLLMClientError",
    "VLLMError",
    "unpinned_nccl_env",
]

STARTED_WITH = "default"  # vLLM's label of the weights that it loaded itself
LABELS_TOKENS = "weight_versions" in {field.name for field in fields(CompletionOutput)}  # not 0.24
# Without labels, the engine's caller notes what a request had written when the weights changed, so it has to hear of
# every token.
OUTPUT_KIND = RequestOutputKind.FINAL_ONLY if LABELS_TOKENS else RequestOutputKind.CUMULATIVE
# Without, every bucket comes on a CUDA stream of its own, for which torch keeps the bucket's memory: up to 32 of them.
REUSES_STREAMS = hasattr(packed_tensor, "_get_streams")  # not 0.24


class TokenVersions:
    """Says which weights sampled each token of one completion: vLLM's labels, or what was current when a token came."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, int]] = []  # (tokens so far, current policy version)

    def add(self, output: CompletionOutput, policy_version: int) -> None:
        if not LABELS_TOKENS:
            self._seen.append((len(output.token_ids), policy_version))

    def of(self, output: CompletionOutput) -> Ints:
        """Return the policy versions [completion_tokens] of the last output."""
        if not LABELS_TOKENS:
            lengths = np.array([length for length, _ in self._seen], np.int64)
            versions = np.array([version for _, version in self._seen], np.int32)
            return np.repeat(versions, np.diff(lengths, prepend=0))
        spans = output.weight_versions
        assert spans is not None  # only an engine that labels nothing has none
        versions = np.array([0 if span.version == STARTED_WITH else int(span.version) for span in spans], np.int32)
        return np.repeat(versions, [span.end - span.start for span in spans])


async def label_weights(engine: Any, policy_version: int) -> None:
    """Set the label of the tokens that an AsyncLLM samples with its present weights."""
    if LABELS_TOKENS:
        await engine.update_weight_version(str(policy_version))


def early_logits_processors(classes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the engine arguments that name the logits processors, for model runners V1 and V2, if those decide."""
    return {} if not classes or HAS_LOGITS_PROCESSORS_V2 else {"logits_processors": [v1 for v1, _ in classes]}


def late_logits_processors(config: Any, classes: Sequence[tuple[str, str]]) -> None:
    """Set them in a finished VllmConfig, which alone knows which model runner it leads to."""
    if classes and HAS_LOGITS_PROCESSORS_V2:
        config.model_config.logits_processors = [pair[config.use_v2_model_runner] for pair in classes]


def inspect_models_in(python: str) -> None:
    """Let vLLM look at the class of a model, which it does once for each user, in a process of another interpreter.

    It starts one to keep CUDA out of its own, which usually imports all of vLLM for it.
    """
    from vllm.model_executor.models import registry

    registry._SUBPROCESS_COMMAND[:] = [python, "-c", f"from {registry.__name__} import _run; _run()"]


def scheduler_name(prefix: str, is_async: bool | None) -> str:
    """Return the name of one of our schedulers, "module.Prefix", of the kind that vLLM would take."""
    return f"{prefix}{'Async' if is_async else ''}Scheduler"


def name_of(finished: Any) -> str:
    """Return the name of a request that a scheduler says it finished: the request itself, or in 0.24 (name, client)."""
    name: str = finished[0] if isinstance(finished, tuple) else finished.request_id
    return name


def finished_like(finished: Any, request: Any) -> Any:
    """Return what a scheduler would say of a request in the place of another one that it finished."""
    return (request.request_id, request.client_index) if isinstance(finished, tuple) else request


def taken_by(message: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values for which a message of vLLM's has a field.

    How weights are packed is said when the transfer is opened since 0.3x, and with every update in 0.24.
    """
    names = {field.name for field in fields(message)}
    return {name: value for name, value in values.items() if name in names}


def suspend(worker: Any, keeps_weights: bool) -> None:
    """Free the GPU memory of a vLLM worker's weights and cache, as its `sleep` does without looking at others."""
    backend = getattr(worker, "sleep_mode_backend", None)
    if backend is not None:
        backend.suspend(1 if keeps_weights else 2)
        return
    from vllm.device_allocator.cumem import CuMemAllocator  # 0.24

    CuMemAllocator.get_instance().sleep(offload_tags=("weights",) if keeps_weights else ())
