"""Reads a model's LM head by itself: the matrix from the last hidden states to logits.

A teacher's engine returns hidden states, so the code that needs probabilities keeps the head: the teacher's actor, and
the learner when it compares whole distributions.
"""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from cluster.config.stages import Dtype, TeacherConfig
from cluster.contracts.errors import ModelError
from cluster.models.model_files import load_model_config
from cluster.models.stop_class import EXCLUDED_LOGIT, merge_logits
from cluster.models.weight_files import find_file, open_weights, weight_files

# The last parts of the names that models give these tensors; a checkpoint has one of each at most, or one per
# multi-token-prediction layer besides, whose names are longer.
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
# What configurations call the number that logits are multiplied (1) or divided (-1) by.
LOGIT_FACTORS = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "logits_scaling": -1,  # Granite, MiniCPM3
}
FLOATS = ("F32", "BF16", "F16")  # as safetensors calls them
COMPARED_ROWS = 4096  # of two matrices at once
WIDTHS = ("hidden_size", "word_embed_proj_dim")  # the latter: OPT, whose last layer is projected
MULTIPLIED_BY_LOGITS_SCALING = "hyperclovax"  # the one family that multiplies by what Granite divides by


@dataclass(frozen=True)
class LmHead:
    """Maps last hidden states, after the final norm, to logits."""

    weight: Tensor  # [vocabulary, width]
    bias: Tensor | None = None  # [vocabulary]
    logit_factor: float = 1.0
    softcap: float | None = None  # logits are squeezed into (-softcap, softcap)
    excluded_ids: Tensor | None = None  # [ids] that have no probability
    name: str = ""  # of the matrix in the model's files
    stop_class: tuple[int, ...] = ()  # ids that count as one token, the first for all

    @property
    def vocabulary_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Map [n, width] in any dtype to new logits [n, vocabulary] in float32.

        They are multiplied in the weight's dtype; a GPU does not round the product to it.
        """
        hidden = hidden.to(self.weight.dtype)
        if self.weight.device.type == "cpu" or self.weight.dtype == torch.float32:
            logits = functional.linear(hidden, self.weight, self.bias).float()
        else:
            logits = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            logits = logits if self.bias is None else logits.add_(self.bias)
        logits = scale_logits(logits, self.logit_factor, self.softcap)
        if self.excluded_ids is not None:
            logits.index_fill_(-1, self.excluded_ids, EXCLUDED_LOGIT)
        if self.stop_class:
            merge_logits(logits, self.stop_class)
        return logits

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the matrix and, where there is one, the bias in the model's files."""
        return (self.name,) if self.bias is None else (self.name, _bias_name(self.name))

    def own_name(self, name: str) -> str | None:
        """Return which of `names` a tensor of a checkpoint is, whose prefix may differ; None: neither."""
        return next((own for own in self.names if _is_called(name, own)), None)

    def updated(self, tensors: Mapping[str, Tensor]) -> "LmHead":
        """Return the head with new values, by their names; raise KeyError if the matrix is not among them."""

        def new(own: str) -> Tensor:
            values = next((values for name, values in tensors.items() if _is_called(name, own)), None)
            if values is None:
                raise KeyError(own)
            return values[: self.vocabulary_size].to(self.weight.device, self.weight.dtype, copy=True)

        weight, bias = (*map(new, self.names), None)[:2]
        assert weight is not None
        return replace(self, weight=weight, bias=bias)

    def to(self, device: torch.device | str) -> "LmHead":
        bias, excluded = (None if part is None else part.to(device) for part in (self.bias, self.excluded_ids))
        return replace(self, weight=self.weight.to(device), bias=bias, excluded_ids=excluded)


def _is_called(name: str, other: str) -> bool:
    """Tell whether two names are of one tensor, which may have a prefix in one of them."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _bias_name(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def multiplies_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products in this dtype are faster in float32 there: torch's own take four times as long."""
    is_plain = platform.machine() == "x86_64" and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return device.type == "cpu" and dtype == torch.bfloat16 and is_plain


def lacks_bfloat16() -> bool:
    """Return whether this machine's CPU multiplies float32 faster than bfloat16."""
    return multiplies_wide(torch.bfloat16, torch.device("cpu"))


def scale_logits(logits: Tensor, logit_factor: float, softcap: float | None) -> Tensor:
    """Do to the head's product what the model does to it."""
    if logit_factor != 1.0:
        logits = logits * logit_factor
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def read_logit_scaling(config: Any) -> tuple[float, float | None]:
    """Return the factor and the soft cap of a model's logits, from its transformers configuration.

    Example:
        >>> from transformers import GraniteConfig
        >>> read_logit_scaling(GraniteConfig(logits_scaling=4.0))
        (0.25, None)
    """
    text_config = config.get_text_config()
    settings = text_config.to_dict()  # families differ in what they have
    factor = 1.0
    for name, power in LOGIT_FACTORS.items():
        value = settings.get(name)
        if value is not None:
            factor *= float(value) ** power
    if text_config.model_type.startswith(MULTIPLIED_BY_LOGITS_SCALING):
        factor = 1.0 / factor
    return factor, settings.get("final_logit_softcapping")  # Gemma


@dataclass(frozen=True)
class HeadFacts:
    """Says all of an LM head but its values, so that a process that loads the model can pick them out."""

    name: str  # of the matrix in the model's files
    vocabulary_size: int  # rows beyond it only pad the matrix
    width: int
    has_bias: bool
    logit_factor: float
    softcap: float | None
    excluded_ids: tuple[int, ...]
    stop_class: tuple[int, ...]

    def make(self, weight: Tensor, bias: Tensor | None) -> LmHead:
        """Return the head with these values; lists of ids get onto their device."""
        excluded = torch.tensor(self.excluded_ids, device=weight.device) if self.excluded_ids else None
        return LmHead(weight, bias, self.logit_factor, self.softcap, excluded, self.name, self.stop_class)


def load_lm_head(
    model: str,
    trust_remote_code: bool,
    dtype: Dtype,
    excluded_ids: Sequence[int] = (),
    stop_class: Sequence[int] = (),
) -> LmHead:
    """Read the head of a Hugging Face directory or hub id; raise ModelError as `read_head_facts` does.

    The probability of `excluded_ids` goes to the other tokens in proportion, that of `stop_class` to its first id.
    """
    facts = read_head_facts(model, trust_remote_code, excluded_ids, stop_class)
    shards, rows = weight_files(model), facts.vocabulary_size
    weight = _slice(model, shards, facts.name)[:rows]
    bias = _slice(model, shards, _bias_name(facts.name))[:rows] if facts.has_bias else None
    torch_dtype = getattr(torch, dtype)
    return facts.make(weight.to(torch_dtype), None if bias is None else bias.to(torch_dtype))


def read_head_facts(
    model: str, trust_remote_code: bool, excluded_ids: Sequence[int] = (), stop_class: Sequence[int] = ()
) -> HeadFacts:
    """Find a model's head in the headers of its files.

    Raises:
        ModelError: the model has no safetensors, no tensor in them is known to be its head, or the head is quantised.
    """
    config = load_model_config(model, trust_remote_code)
    check_tied_head(model, config)
    shards = weight_files(model)
    name = _head_name(model, shards, _is_tied(config))
    vocabulary_size = int(config.get_text_config().vocab_size)
    matrix = _slice(model, shards, name)
    shape = list(matrix.get_shape())
    if len(shape) != 2 or matrix.get_dtype() not in FLOATS:
        raise ModelError(
            f"model '{model}': its LM head '{name}' is {matrix.get_dtype()} {shape}, expected {', '.join(FLOATS)} "
            "[vocabulary, width]; use a copy of the model whose head is not quantised"
        )
    if shape[0] < vocabulary_size:
        raise ModelError(f"model '{model}': its LM head '{name}' has {shape[0]} rows for {vocabulary_size} tokens")
    return HeadFacts(
        name,
        vocabulary_size,
        shape[1],
        _bias_name(name) in shards,
        *read_logit_scaling(config),
        tuple(token_id for token_id in excluded_ids if token_id < vocabulary_size),
        tuple(token_id for token_id in stop_class if token_id < vocabulary_size),
    )


def load_teacher_head(teacher: TeacherConfig) -> LmHead:
    """Read the head of a teacher as its section of the run file says; raise ModelError as `load_lm_head` does."""
    return load_lm_head(
        teacher.model,
        teacher.trust_remote_code,
        teacher.engine.dtype,
        teacher.excluded_token_ids,
        teacher.stop_class,
    )


def check_lm_head(model: str, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check from the files' headers that the head has the configuration's shape; raise ModelError if not."""
    name = _head_name(model, shapes, _is_tied(config))
    text = config.get_text_config()
    shape, rows = shapes[name], text.vocab_size
    widths = {getattr(text, field, None) for field in WIDTHS} - {None}
    if len(shape) != 2 or shape[0] < rows or (widths and shape[1] not in widths):
        raise ModelError(
            f"model '{model}': its LM head '{name}' is {list(shape)}, but config.json says vocab_size = {rows} and "
            f"hidden_size = {', '.join(map(str, widths))}; weights and config.json are of different models"
        )


def check_tied_head(model: str, config: PretrainedConfig) -> None:
    """Check that a head beside the embedding that it is tied to is the same matrix; raise ModelError if not.

    Loaders go by the configuration and leave the head of the files out, which may be the one that was trained.
    """
    files = weight_files(model)
    heads = [name for name in files if any(name == end or name.endswith(f".{end}") for end in HEAD_NAMES)]
    if not _is_tied(config) or not heads:
        return
    head, embedding = min(heads, key=len), _head_name(model, files, is_tied=True)
    if not _is_equal(_slice(model, files, head), _slice(model, files, embedding)):
        raise ModelError(
            f"model '{model}': config.json says tie_word_embeddings = true, but '{head}' in its files differs from "
            f"'{embedding}'; set it to false if the model was trained with a head of its own, or remove '{head}'"
        )


def _is_equal(one: Any, other: Any) -> bool:
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    blocks = (slice(start, start + COMPARED_ROWS) for start in range(0, shape[0], COMPARED_ROWS))
    return all(bool((one[rows] == other[rows]).all()) for rows in blocks)


def _is_tied(config: Any) -> bool:
    """Tell whether embedding and head are one tensor; of a model of several parts, the outer word counts."""
    outer, inner = (part.to_dict().get("tie_word_embeddings") for part in (config, config.get_text_config()))
    return bool(inner if outer is None else outer)


def _head_name(model: str, shards: Iterable[str], is_tied: bool) -> str:
    known = EMBEDDING_NAMES if is_tied else HEAD_NAMES
    names = [name for name in shards if any(name == end or name.endswith(f".{end}") for end in known)]
    if not names:
        kind = "embedding, which is also its LM head," if is_tied else "LM head"
        raise ModelError(
            f"model '{model}': its {kind} was not found in its safetensors; expected a tensor called {', '.join(known)}"
        )
    return min(names, key=len)


def _slice(model: str, shards: dict[str, Path], name: str) -> Any:
    """Return a tensor of the files, of which rows are read when they are indexed."""
    shard = shards[name]
    path = shard if shard.exists() else find_file(model, shard.name)  # of a hub id, the index alone may be here
    if path is None:
        raise ModelError(f"model '{model}': its index names {shard.name}, which is missing")
    with open_weights(model, path) as tensors:
        return tensors.get_slice(name)
