"""Counts from a model's configuration, without reading a weight, what decides its memory."""

from dataclasses import dataclass

from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ModelError
from cluster.models.model_files import load_model_config


@dataclass(frozen=True)
class ModelSize:
    """Holds the numbers of one model.

    Example:
        >>> ModelSize("llama", 8_000_000_000, 32, 4096, 14336, 128_256, kv_width=1024).describe()
        'llama, 8B parameters'
    """

    kind: str  # model_type of its configuration
    parameters: int
    layers: int
    width: int  # of the hidden states
    inner_width: int  # of the feed-forward layers; of a mixture of experts, those that one token uses
    vocabulary: int
    kv_width: int  # of the keys, and of the values, of one layer
    is_quantized: bool = False  # in its files

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_width

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.width

    def describe(self) -> str:
        unit, letter = next((unit, letter) for unit, letter in UNITS if self.parameters >= unit)
        return f"{self.kind}, {self.parameters / unit:.3g}{letter} parameters"


UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "k"), (1, ""))


def model_size(section: StudentConfig | TeacherConfig) -> ModelSize:
    """Build the model without memory and count; raise ModelError where transformers cannot build it."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_model_config(section.model, section.trust_remote_code)
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(text, trust_remote_code=section.trust_remote_code)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"model '{section.model}': its config.json describes no causal language model: {error}"
        ) from error
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    experts = getattr(text, "num_experts_per_tok", None)
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
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        is_quantized=getattr(config, "quantization_config", None) is not None,
    )
