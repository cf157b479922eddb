"""Finds what an update left out of a vLLM model, and mends what vLLM's reloading forgets on CPU.

vLLM's own loaders pass over much in silence: a bias that it has no place for, or an expert under a name that it does
not know. So every update is held against the model twice: by the names that vLLM reports, and by the values that it
counts in each layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

# Parameters to vLLM, but buffers to transformers: training leaves them as the checkpoint has them.
BUFFERS = ("e_score_correction_bias",)


def tied_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that use a parameter of an earlier layer."""
    owners: dict[int, nn.Module] = {}
    return [
        layer
        for layer in model.modules()
        for parameter in layer.parameters(recurse=False)
        if owners.setdefault(id(parameter), layer) is not layer
    ]


def missing_parameters(
    model_names: set[str], loaded_names: set[str], received_names: set[str], packed: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the parameters that an update lacks, sorted.

    vLLM packs some parameters into one (`qkv_proj` from `q_proj`, `k_proj`, `v_proj`) and reports the packed one as
    loaded when any part came; the parts are therefore checked one by one.

    `received_names` are the checkpoint's, the others vLLM's; `packed` maps the last name of a packed module to its
    parts.
    """
    missing = sorted(name for name in model_names - loaded_names if not name.endswith(BUFFERS))
    for name in sorted(loaded_names):
        parts = _parts(name, packed)
        if not received_names.isdisjoint(parts):
            missing.extend(part for part in parts if part not in received_names)
    return missing


def _parts(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    pieces = name.split(".")
    for position, piece in enumerate(pieces):
        if piece in packed:
            return [".".join([*pieces[:position], part, *pieces[position + 1 :]]) for part in packed[piece]]
    return []


def fault_of_incomplete(model: nn.Module, tied: Sequence[nn.Module]) -> str | None:
    """Say which layers an update under way has not filled, with the values that came and that they hold.

    vLLM counts the values that it copies into a layer and takes the layer up when it is full; call this after the last
    bucket, before vLLM takes up the rest. Tied layers are filled through those that own their parameters. What the
    attention kernel has is optional: scales of a quantised cache.
    """
    incomplete = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        is_attention = hasattr(layer, "process_weights_after_loading")
        if not info.can_load() or is_attention or layer in tied:  # the first: full
            continue
        size = _loadable_values(layer)
        if info.load_numel < size:
            incomplete.append(f"{name} ({info.load_numel:,} of {size:,} values)")
    return f"the update does not fill {', '.join(incomplete)}" if incomplete else None


def _loadable_values(layer: nn.Module) -> int:
    """Return how many values a checkpoint has for a layer itself."""
    size = 0
    for name, parameter in layer.named_parameters(recurse=False):
        # While a model is reloaded, what waits for its values is on no device; a bias waits where it is.
        if parameter.is_meta or name == "bias":
            values = getattr(parameter, "weight_loader_numel", parameter.numel())  # without what only pads experts
            rows = getattr(layer, "shard_indices", None)  # of an embedding or head, which the vocabulary may not fill
            size += values if rows is None else values // len(parameter) * rows.num_org_elements
    return size


def take_expert_kernels(model: nn.Module) -> list[tuple[Any, Any]]:
    """Take the experts' kernels away on CPU; return the layers' methods with what was taken.

    vLLM 0.32 packs experts for its CPU kernel where it makes the kernel, so at the first load alone. An update would
    leave them as the checkpoint has them, and the kernel would read them as packed. Without a kernel, vLLM makes one.
    """
    if not current_platform.is_cpu():
        return []
    methods: list[Any] = [getattr(layer, "quant_method", None) for layer in model.modules()]
    taken = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None) is not None]
    for method, _ in taken:
        method.moe_kernel = None
    return taken


def return_expert_kernels(taken: Sequence[tuple[Any, Any]]) -> None:
    """Give kernels back to the layers that an update did not reach."""
    for method, kernel in taken:
        method.moe_kernel = method.moe_kernel or kernel


def repack_tied(layers: Sequence[nn.Module]) -> None:
    """Pack the weights of tied layers again.

    On CPU a tied lm_head multiplies with a packed copy of the embedding. No weights arrive under its own name, so vLLM
    0.32 leaves the copy as it was, and the model goes on answering with the old lm_head.
    """
    for layer in layers:
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(layer)
