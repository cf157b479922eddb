"""Reads what stands beside a model's weights: configuration, tokenizer, context length.

Importing this does not import transformers, which takes four CPU-seconds; commands that read no model start at once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contracts.errors import ModelError
from cluster.contracts.files import read_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MAX_JSON_BYTES = 1 << 28  # tokenizers of large vocabularies take tens of megabytes


def read_object(path: Path, model: str) -> dict[str, Any]:
    """Return the object that a JSON file of the model holds; raise ModelError where it cannot."""
    text = read_text(path, "model file", ModelError, MAX_JSON_BYTES)
    try:
        content = json.loads(text)  # takes Infinity, which some configurations hold
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model '{model}': {path.name} is not valid JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"model '{model}': {path.name} holds {type(content).__name__}; expected an object")
    return content


MAX_LAYERS = 100_000  # transformers makes a list of them, which takes for ever where the number is damaged
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
ADAPTER_FILE = "adapter_config.json"  # of peft; loaders that have it add what it describes to the model, others do not
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_model_config(model: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Read a model's configuration; raises ModelError where it cannot, like `load_tokenizer`."""
    from transformers import AutoConfig

    return _read(AutoConfig, model, "model configuration", trust_remote_code)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    # Without one, transformers makes up an empty tokenizer of the family.
    if _is(model, Path.is_dir):
        names = {path.name for path in Path(model).iterdir()}
        if names.isdisjoint(TOKENIZER_FILES) and not any(name.endswith(".tiktoken") for name in names):
            raise ModelError(f"model '{model}': has no tokenizer; copy its {TOKENIZER_FILES[0]} there")
    return _read(AutoTokenizer, model, "tokenizer", trust_remote_code)


def context_length(config: "PretrainedConfig") -> int:
    """Return how many tokens the model can attend to; raises ModelError where its configuration does not say."""
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(tokens, int) or tokens < 1:
        raise ModelError(
            f"model '{config.name_or_path}': max_position_embeddings in its config.json is {tokens}; "
            "expected its context in tokens"
        )
    return tokens


def read_stop_ids(model: str, config: "PretrainedConfig") -> frozenset[int]:
    """Return the tokens that end the model's turns, from its generation settings or else its configuration."""
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(model)
    except OSError:  # there are none
        settings = GenerationConfig.from_model_config(config)
    except Exception as error:  # whatever a wrong field leads to
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"model '{model}': cannot read its generation_config.json: {reason}") from error
    ids = settings.eos_token_id
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in listed):
        raise ModelError(f"model '{model}': eos_token_id is {ids!r}; expected the id of a token, or a list of ids")
    return frozenset(listed)


def is_local(model: str) -> bool:
    """Tell a path from a hub id: a hub id is `name` or `owner/name` and never exists as a folder here."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or _is(model, Path.exists)


def _is(model: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(Path(model))
    except OSError:  # longer than a file name may be
        return False


def _read(loader: Any, model: str, what: str, trust_remote_code: bool) -> Any:
    if is_local(model):
        _check_folder(model, trust_remote_code)
    try:
        return loader.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises Exception itself, and transformers whatever a wrong field leads to
        reason = str(error).strip() or type(error).__name__
        raise ModelError(f"model '{model}': cannot read its {what}: {reason}") from error


def _check_folder(model: str, trust_remote_code: bool) -> None:
    """Check what transformers would answer with a trace, a guess or a warning."""
    folder = Path(model)
    if not _is(model, Path.is_dir):
        raise ModelError(f"model '{model}': no such directory; give a Hugging Face directory or a hub id")
    if (folder / ADAPTER_FILE).exists():
        base = read_object(folder / ADAPTER_FILE, model).get("base_model_name_or_path")
        raise ModelError(
            f"model '{model}': is a LoRA adapter of {base} ({ADAPTER_FILE}); merge it into {base} first, with peft's "
            f"merge_and_unload, and save the whole model where there is no {ADAPTER_FILE}"
        )
    config = read_object(folder / "config.json", model)
    for name in JSON_FILES:
        if (folder / name).exists() or (folder / name).is_symlink():
            read_object(folder / name, model)
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise ModelError(f"model '{model}': num_hidden_layers in its config.json is {layers}; is it damaged?")
    _check_kind(model, config, trust_remote_code)


def _check_kind(model: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if "auto_map" not in config:
        raise ModelError(f"model '{model}': model_type in config.json is {kind!r}, which transformers does not know")
    if not trust_remote_code:
        raise ModelError(
            f"model '{model}': runs code of its own (auto_map in config.json); if you trust it, set "
            "trust_remote_code = true in its section of the run file"
        )
