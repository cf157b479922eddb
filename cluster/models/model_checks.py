"""Checks, before any engine starts, that a model's files are whole and go together."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config.objective import TokenWeightsConfig
from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ModelError
from cluster.models.model_files import context_length, is_local, load_model_config, load_tokenizer, read_stop_ids
from cluster.models.weight_files import check_weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What configurations call layers that are no attention, in `layer_types`.
RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "mamba", "mamba2", "recurrent"})


@dataclass(frozen=True)
class ModelFacts:
    """Holds what the rest of a run needs to know of a model."""

    tokenizer: "PreTrainedTokenizerBase"
    context_tokens: int
    vocabulary: int  # tokens that the model gives probabilities to
    stop_ids: frozenset[int] = frozenset()  # that end its turns, as its generation settings say
    width: int = 0  # of its hidden states
    depth: int = 0  # layers

    @property
    def stops(self) -> frozenset[int]:
        """Return all tokens that end its turns, as vLLM has it: those of its generation settings, and its EOS."""
        return self.stop_ids if self.tokenizer.eos_token_id is None else self.stop_ids | {self.tokenizer.eos_token_id}


def read_model(section: StudentConfig | TeacherConfig, is_student: bool) -> ModelFacts:
    """Read configuration, tokenizer and, of a local directory, the weights' headers; raise ModelError for a fault.

    The student is compared with what transformers builds from its configuration, for the learner builds the same; of a
    teacher, which vLLM builds, the LM head is, which is read by name.
    """
    model = section.model
    config = load_model_config(model, section.trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model '{model}': is an encoder with a decoder; expected a decoder-only language model")
    tokenizer = load_tokenizer(model, section.trust_remote_code)
    vocabulary = _vocabulary(model, config, tokenizer)
    if is_student:
        _refuse_quantised(model, config)
    if is_local(model):
        from cluster.models.lm_head import check_lm_head, check_tied_head

        shapes = check_weight_files(model, config)
        if is_student:
            _check_shapes(section, config, shapes)
        else:
            check_lm_head(model, config, shapes)
        check_tied_head(model, config)
    text = config.get_text_config()
    return ModelFacts(
        tokenizer,
        context_length(config),
        vocabulary,
        read_stop_ids(model, config),
        width=getattr(text, "hidden_size", 0),
        depth=getattr(text, "num_hidden_layers", 0),
    )


def ignored_ids(student: StudentConfig, weights: TokenWeightsConfig, stop_token_ids: Collection[int]) -> frozenset[int]:
    """Return the tokens that have no loss: special ones, or those that end a completion, as the weights say.

    `stop_token_ids` end completions besides those of the student's own files.
    """
    if weights.special_tokens and weights.stop_tokens:
        return frozenset()
    tokenizer = load_tokenizer(student.model, student.trust_remote_code)
    config = load_model_config(student.model, student.trust_remote_code)
    stops = ModelFacts(tokenizer, 0, 0, read_stop_ids(student.model, config)).stops.union(stop_token_ids)
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ignored = set() if weights.special_tokens else added.union(tokenizer.all_special_ids) - stops
    return frozenset(ignored if weights.stop_tokens else ignored | stops)


def _refuse_quantised(model: str, config: "PretrainedConfig") -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ModelError(
            f"student '{model}': is quantised ({method}, quantization_config in its config.json), and a student learns "
            "in whole weights; take the model that it was made from, or save a dequantised copy"
        )


def _vocabulary(model: str, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the model's vocabulary; tokens added beside the tokenizer's own may lie beyond it, as Gemma 3's do."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int) or size < max(1, tokenizer.vocab_size):
        raise ModelError(
            f"model '{model}': vocab_size in its config.json is {size}, but its tokenizer has {tokenizer.vocab_size} "
            "tokens; they are of different models"
        )
    if not len(tokenizer):
        raise ModelError(f"model '{model}': its tokenizer has no tokens; copy tokenizer.json again")
    return size


def _check_shapes(
    section: StudentConfig | TeacherConfig, config: "PretrainedConfig", shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Build the model without memory, and compare the parameters whose names the files have."""
    import torch
    from transformers import AutoModelForCausalLM

    model = section.model
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"model '{model}': its config.json describes no causal language model: {error}") from error
    _refuse_recurrent(model, config, built)
    expected = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    if not {_last_parts(name) for name in expected} & {_last_parts(name) for name in shapes}:
        raise ModelError(f"model '{model}': its weights are of another kind of model than config.json says")
    for name, shape in shapes.items():
        if expected.get(name, shape) != shape:
            raise ModelError(
                f"model '{model}': '{name}' is {list(shape)}, but config.json makes it {list(expected[name])}; "
                "weights and config.json are of different models"
            )


def _refuse_recurrent(model: str, config: "PretrainedConfig", built: "PreTrainedModel") -> None:
    """Refuse layers that carry a state from token to token: no mask keeps packed trajectories apart in them."""
    kinds = RECURRENT_LAYERS.intersection(getattr(config.get_text_config(), "layer_types", None) or ())
    if kinds or built._is_stateful:
        raise ModelError(
            f"student '{model}': {config.model_type} has {', '.join(sorted(kinds)) or 'recurrent'} layers, which carry "
            "a state from one token to the next, and the learner packs several trajectories into one row; take a "
            "student whose layers all attend (as a teacher such a model works)"
        )


def _last_parts(name: str) -> str:
    """Return the end of a parameter's name; checkpoints differ in what stands before it."""
    return ".".join(name.split(".")[-2:])
