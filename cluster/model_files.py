"""Reads what stands beside a model's weights: configuration, tokenizer, context length."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from cluster.contracts.errors import ModelError


def load_model_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the model's configuration.

    Raises:
        ModelError: the directory or hub id does not exist or cannot be read.
    """
    return _read(AutoConfig, model, "model configuration", trust_remote_code)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        ModelError: the directory or hub id does not exist or cannot be read.
    """
    return _read(AutoTokenizer, model, "tokenizer", trust_remote_code)


def context_length(config: PretrainedConfig) -> int:
    """Return how many tokens the model can attend to."""
    return int(config.get_text_config().max_position_embeddings)


def _read(loader: Any, model: str, what: str, trust_remote_code: bool) -> Any:
    if looks_local(model) and not Path(model).is_dir():
        raise ModelError(f"model '{model}': no such directory; give a Hugging Face directory or a hub id")
    try:
        return loader.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model '{model}': cannot read its {what}: {reason}") from error


def looks_local(model: str) -> bool:
    """Tell a path from a hub id: a hub id is `name` or `owner/name` and never exists as a folder here."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
