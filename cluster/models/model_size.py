"""Counts from a model's configuration, without reading a weight, what decides its memory."""

from dataclasses import dataclass
from typing import Any

from cluster.config.run_config import Config
from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ModelError
from cluster.models.model_files import load_model_config

STUDENT = "student"  # key of its size, beside teachers' names
USUAL_BITS = 8  # of a quantised weight, where the configuration does not say


@dataclass(frozen=True)
class ModelSize:
    """Holds the numbers of one model.

    Example:
        >>> ModelSize("llama", 8_000_000_000, 32, 4096, 14336, 128_256, query_width=4096, kv_width=1024).describe()
        'llama, 8B parameters'
    """

    kind: str  # model_type of its configuration
    parameters: int
    layers: int
    width: int  # of the hidden states
    inner_width: int  # of the feed-forward layers; of a mixture of experts, those that one token uses
    vocabulary: int
    query_width: int  # all heads' queries of one layer
    kv_width: int  # of the keys, and of the values, of one layer
    heads: int = 32
    kv_heads: int = 8
    experts_per_token: int = 0  # 0: the model has no experts
    norms_queries: bool = False  # and keys, each head by itself
    is_tied: bool = False  # the LM head is the embedding
    weight_bits: int | None = None  # of its files, but for embedding and LM head; None: it is not quantised

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_width

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.width

    def weight_bytes(self, value_bytes: int, quantized: bool = False) -> float:
        """Return what the weights take; `quantized` ones as their files say, or a byte each, but embedding and head."""
        bits = self.weight_bits or (USUAL_BITS if quantized else None)
        if bits is None:
            return self.parameters * value_bytes
        kept = self.head_parameters * (1 if self.is_tied else 2)
        return kept * value_bytes + (self.parameters - kept) * bits / 8

    def saved_bytes_per_token(self, value_bytes: int) -> float:
        """Return what autograd keeps of one token in one layer, in transformers' own modules.

        A norm keeps its input in float32, its result and one number; the linear layers behind it their common input.
        Attention keeps queries, keys, values, its result, and a float32 sum per head; a gated feed-forward layer its
        gate before and after the activation, its other half, and their product. Each token's experts have copies of
        its input and of their results.
        """
        norms, normed = 2, 2 * self.width
        if self.norms_queries:
            norms += self.heads + self.kv_heads
            normed += self.query_width + self.kv_width
        attention = value_bytes * (2 * self.query_width + 2 * self.kv_width) + 4 * self.heads
        values = 2 * self.width + 4 * self.inner_width + 2 * self.experts_per_token * self.width
        return (4 + value_bytes) * normed + 4 * norms + attention + value_bytes * values

    def describe(self) -> str:
        unit, letter = next((unit, letter) for unit, letter in UNITS if self.parameters >= unit)
        return f"{self.kind}, {self.parameters / unit:.3g}{letter} parameters"


UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "k"), (1, ""))


def model_sizes(config: Config, skips_unknown: bool = False) -> dict[str, ModelSize]:
    """Return the sizes of the student and of the teachers that engines of the run serve.

    With `skips_unknown`, a teacher that transformers cannot build has none.
    """
    engines = {name: one for name, one in config.teachers.items() if one.engine.tensor_parallel}
    sizes = {STUDENT: model_size(config.student)}
    for name, teacher in engines.items():
        try:
            sizes[name] = sizes[STUDENT] if teacher.model == config.student.model else model_size(teacher)
        except ModelError:
            if not skips_unknown:
                raise
    return sizes


def model_size(section: StudentConfig | TeacherConfig) -> ModelSize:
    """Build the model without memory and count; raise ModelError where transformers cannot build it."""
    config = load_model_config(section.model, section.trust_remote_code)
    try:
        return size_of(config, section.trust_remote_code)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"model '{section.model}': its config.json describes no causal language model: {error}"
        ) from error


def size_of(config: Any, trust_remote_code: bool = False) -> ModelSize:
    """Return the numbers of a configuration of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(text, trust_remote_code=trust_remote_code)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    experts = getattr(text, "num_experts_per_tok", None) or 0
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    if experts:
        inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
    return ModelSize(
        kind=config.model_type,
        parameters=built.num_parameters(),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner_width=inner,
        vocabulary=text.vocab_size,
        query_width=heads * head_width,
        kv_width=kv_heads * head_width,
        heads=heads,
        kv_heads=kv_heads,
        experts_per_token=experts,
        norms_queries=any(".q_norm." in name for name, _ in built.named_parameters()),
        is_tied=bool(getattr(text, "tie_word_embeddings", False)),
        weight_bits=_weight_bits(getattr(config, "quantization_config", None)),
    )


def _weight_bits(quantization: Any) -> int | None:
    """Return the bits of a weight that a configuration's section tells of; None: there is none."""
    if quantization is None:
        return None
    section = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if section.get("load_in_4bit"):
        return 4
    groups = section.get("config_groups") or {}
    of_groups = [group.get("weights", {}).get("num_bits") for group in groups.values() if isinstance(group, dict)]
    return section.get("bits") or next(filter(None, of_groups), USUAL_BITS)
