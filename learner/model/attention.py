"""Computes attention over packed trajectories, one after the other: each token sees its own trajectory alone.

transformers' own way with packed rows (`learner.attention = "masked"`) builds a mask of [rows, length, length], which
keeps CUDA's flash kernels away. Here the tokens of a micro-batch stand in one row without padding, and a kernel knows
where the trajectories begin; memory grows with the tokens, not with their square.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cluster.config.stages import Attention
from cluster.contracts.errors import ModelError

PACKED = "preceptor_packed"  # how transformers knows `packed_attention`
KERNEL_TOLERANCE = 0.03  # of the norm; bfloat16 makes errors of about 0.005, a wrong mask of more than 0.1
PROBE_LENGTHS = (5, 3)
USUAL_WIDTH = 64  # of a head, where a model does not say
# What some models ask of their attention that the kernels here are not told.
UNKNOWN_REQUESTS = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Segments:
    """Holds where the trajectories of a packed row begin, and grids of those of similar length.

    A grid has trajectories of which none is twice as long as another, padded at the end to the longest.

    Example:
        >>> segments = Segments.of([2, 3], torch.device("cpu"))
        >>> segments.boundaries.tolist(), segments.grids, segments.padded.tolist(), segments.order.tolist()
        ([0, 2, 5], ((1, 2), (1, 3)), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    longest: int
    boundaries: Tensor  # [trajectories + 1] int32
    grids: tuple[tuple[int, int], ...]  # trajectories, and tokens of the longest
    padded: Tensor  # [places of all grids] int64: which token stands there; at padding, the trajectory's last
    order: Tensor  # [tokens] int64: in which of these places each token is

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        """Describe trajectories of these lengths, each at least 1, in their order."""
        boundaries = np.concatenate([[0], np.cumsum(lengths)])
        doublings = np.array([(length - 1).bit_length() for length in lengths])
        members = [np.flatnonzero(doublings == doubling) for doubling in np.unique(doublings)]
        spans = [_padded(boundaries[group], np.array(lengths)[group]) for group in members]
        padded = np.concatenate([tokens.reshape(-1) for tokens, _ in spans])
        real = np.flatnonzero(np.concatenate([is_real.reshape(-1) for _, is_real in spans]))
        return cls(
            longest=max(lengths),
            boundaries=torch.from_numpy(boundaries.astype(np.int32)).to(device),
            grids=tuple(tokens.shape for tokens, _ in spans),
            padded=torch.from_numpy(padded).to(device),
            order=torch.from_numpy(real[np.argsort(padded[real])]).to(device),
        )


# (query [tokens, heads, width], key [tokens, key_value_heads, width], value, whose width may be another, scale) to
# [tokens, heads, width of the values]
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]


@dataclass(frozen=True)
class Packing:
    """Holds what the attention of every layer needs of a micro-batch."""

    segments: Segments
    kernel: Kernel


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, width]
    key: Tensor,  # [1, key_value_heads, tokens, width]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **requests: Any,
) -> tuple[Tensor, None]:
    """Attend within trajectories, as transformers calls it; without a packing, as for one sequence."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **requests)
    unknown = [name for name in UNKNOWN_REQUESTS if requests.get(name) is not None]
    if unknown:
        raise ModelError(
            f"learner: {type(module).__name__} asks its attention for {unknown[0]}, which packed attention "
            'does not do; set learner.attention = "masked"'
        )
    rows = tuple(part[0].transpose(0, 1) for part in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packing.kernel(rows[0], rows[1], rows[2], packing.segments, scale).unsqueeze(0), None


def choose_kernel(wanted: Attention, model_config: Any, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the kernel for packed attention, or None for transformers' own way with a mask.

    "auto" takes, on CUDA in half precision, the first of `flash`, `varlen` that is installed and agrees with `grouped`;
    otherwise `grouped`; and `masked` for models with windows or caps, or with attention of their own making.

    Raises:
        ModelError: a kernel was asked for by name that is not there or does not work here.
    """
    if wanted == "masked" or (wanted == "auto" and not _is_plain(model_config)):
        return None
    widths = head_widths(model_config)
    if wanted == "auto":
        on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        tried = ("flash", "varlen") if on_gpu else ()
        flash = [name for name in tried if not fault_of(name, device, dtype, widths)]
        return KERNELS[flash[0] if flash else "grouped"]()
    if fault := fault_of(wanted, device, dtype, widths):
        raise ModelError(f'learner.attention = "{wanted}" does not work here: {fault}; take "auto" or "grouped"')
    return KERNELS[wanted]()


def head_widths(model_config: Any) -> tuple[int, int]:
    """Return how wide a head's queries and keys are, and its values; latent attention has two numbers."""
    text = model_config.get_text_config()
    heads, hidden = (getattr(text, name, None) for name in ("num_attention_heads", "hidden_size"))
    width = getattr(text, "head_dim", None) or (hidden // heads if hidden and heads else USUAL_WIDTH)
    return getattr(text, "qk_head_dim", None) or width, getattr(text, "v_head_dim", None) or width


def fault_of(name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    """Say why a kernel cannot be used, after a forward and backward of two short sequences; None if it can.

    Flash kernels take a multiple of 8 as a head's width, and the same for its values.
    """
    try:
        attended = _probe(KERNELS[name](), device, dtype, widths)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        # Of torch's page about backends, the first sentence.
        return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
    expected = _probe(grouped, device, dtype, widths)
    # Not Python's `max`, which may pass over what is not a number.
    off = torch.stack(
        [(one - other).norm() / other.norm() for one, other in zip(attended, expected, strict=True)]
    ).max()
    return None if off <= KERNEL_TOLERANCE else f"it differs from plain attention by {off:.1%}"


def register_packed_attention() -> str:
    """Let transformers find `packed_attention`; return the name to load a model with."""
    AttentionInterface.register(PACKED, packed_attention)
    return PACKED


def grouped(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attend by torch's attention, once per group of trajectories of similar length.

    Padding stands at the end, where causal attention never reads from a real token, so no mask is needed.
    """
    shares_keys, on_gpu = query.shape[1] > key.shape[1], query.device.type == "cuda"
    if shares_keys and on_gpu:  # its kernel for float32 wants as many heads of each
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    # `index_select` sums its gradient up faster than indexing does.
    rows = [part.index_select(0, segments.padded) for part in (query, key, value)]
    results, start = [], 0
    for grid in segments.grids:
        end = start + grid[0] * grid[1]
        q, k, v = (part[start:end].unflatten(0, grid).transpose(1, 2) for part in rows)
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=shares_keys and not on_gpu
        )
        results.append(attended.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(results).index_select(0, segments.order)


def _flash() -> Kernel:
    """Return FlashAttention's own kernel, if flash-attn is installed and was built for this torch."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        bounds, longest = segments.boundaries, segments.longest
        arguments = (query, key, value, bounds, bounds, longest, longest)
        return flash_attn_varlen_func(*arguments, softmax_scale=scale, causal=True)

    return attend


def _varlen() -> Kernel:
    """Return the kernel that comes with torch; raise ImportError if it takes no scale."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        raise ImportError("torch.nn.attention.varlen takes a scale from torch 2.11 on")

    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
        share = query.shape[1] // key.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal
        if share > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif share > 1:
            key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        bounds, longest = segments.boundaries, segments.longest
        attended = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
        assert isinstance(attended, Tensor), "no auxiliary results are asked for"
        return attended

    return attend


KERNELS: dict[str, Callable[[], Kernel]] = {"flash": _flash, "varlen": _varlen, "grouped": lambda: grouped}


def _probe(kernel: Kernel, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> list[Tensor]:
    """Return the outputs of two sequences, and the gradients by query, key and value; four heads share two keys."""
    random = torch.Generator().manual_seed(0)
    segments = Segments.of(PROBE_LENGTHS, device)
    shapes = [(sum(PROBE_LENGTHS), heads, width) for heads, width in ((4, widths[0]), (2, widths[0]), (2, widths[1]))]
    rows = [torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes]
    with torch.enable_grad():
        attended = kernel(rows[0], rows[1], rows[2], segments, widths[0] ** -0.5)
        gradients = torch.autograd.grad(attended.square().sum() / 2, rows)
    return [part.detach().float() for part in (attended, *gradients)]


def plain_attention(model_config: Any) -> str:
    """Return transformers' attention with masks; torch's, "sdpa", leaves out Gemma 2's cap of attention in silence."""
    return "eager" if getattr(model_config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def _is_plain(model_config: Any) -> bool:
    """Return whether every layer attends to all earlier tokens, without caps, by a function that one can choose."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if not getattr(model_class, "_supports_attention_backend", False):
        return False
    kinds = getattr(model_config, "layer_types", None) or ()
    window = getattr(model_config, "sliding_window", None) if not kinds else None
    caps = getattr(model_config, "attn_logit_softcapping", None)
    return all(kind == "full_attention" for kind in kinds) and window is None and caps is None


def _padded(starts: Any, lengths: Any) -> tuple[Any, Any]:
    """Return the tokens [trajectories, longest] of a grid, and which of them are no padding."""
    steps = np.arange(lengths.max())
    return starts[:, None] + np.minimum(steps, lengths[:, None] - 1), steps < lengths[:, None]
