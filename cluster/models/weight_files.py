"""Finds a model's safetensors and reads their headers, without reading a weight.

Only safetensors are taken: other formats are pickles, which run what their author wrote when they are loaded.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cluster.contracts.errors import ModelError
from cluster.models.model_files import read_object
from cluster.weight_sync.manifest import new_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
SAMPLED_PLACES = 64  # of each file for its fingerprint, evenly spaced; its header is the first
SAMPLE_BYTES = 4096
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def weight_files(model: str) -> dict[str, Path]:
    """Return the file of each tensor; a hub id's are in the hub's cache. Without safetensors, raise ModelError."""
    index = find_file(model, INDEX_FILE)
    if index is not None:
        return {name: index.parent / shard for name, shard in _weight_map(model, index).items()}
    single = find_file(model, SINGLE_FILE)
    if single is None:
        folder = Path(model)
        others = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)) if folder.is_dir() else []
        instead = (
            f", only {others[0]}, which is not loaded because such files can run code; save the model as safetensors"
            if others
            else "; save it as safetensors"
        )
        raise ModelError(f"model '{model}': found neither {SINGLE_FILE} nor {INDEX_FILE}{instead}")
    with open_weights(model, single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def find_file(model: str, name: str) -> Path | None:
    """Return where a file of the model is, fetched from the hub if it has to be; None if the model has none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.exists() or path.is_symlink() else None
    from transformers.utils.hub import cached_file

    try:
        return Path(cached_file(model, name))
    except OSError:  # also what a hub that cannot be reached raises, but the configuration has just been read from it
        return None


def open_weights(model: str, path: Path) -> Any:
    """Open one file of weights; it maps them, and checks that the header describes the whole of the file."""
    if not path.is_file():
        raise ModelError(f"model '{model}': {path.name} is missing or no file; copy the whole model again")
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"model '{model}': cannot read {path.name}: {error}; the file is damaged or cut: copy it again"
        ) from error
    except RuntimeError as error:  # of torch, which the system gave no room for the whole file
        raise ModelError(
            f"model '{model}': {path.name} is too large for this machine's memory: {error}; save the model in smaller "
            'files, save_pretrained(..., max_shard_size="5GB")'
        ) from error


def check_weight_files(model: str, config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """Read every header of a local model and return each tensor's shape; raise ModelError for a fault."""
    files = weight_files(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with open_weights(model, path) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not shapes:
        raise ModelError(f"model '{model}': its safetensors hold no tensor; save it again")
    lost = sorted(files.keys() - shapes.keys())
    if lost:
        raise ModelError(
            f"model '{model}': {files[lost[0]].name} lacks the tensor '{lost[0]}' that the index says it has"
        )
    _check_layers(model, config, list(shapes))
    return shapes


def _check_layers(model: str, config: "PretrainedConfig", names: Sequence[str]) -> None:
    """Look for layers without weights, which a loader would fill with random ones."""
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    needed = getattr(config.get_text_config(), "num_hidden_layers", 0)
    missing = sorted(set(range(min(needed, max(layers) + 2))) - layers) if layers else []
    if missing:
        raise ModelError(
            f"model '{model}': config.json says num_hidden_layers = {needed}, but layer {missing[0]} has no weights"
        )


def _weight_map(model: str, index: Path) -> Mapping[str, str]:
    weight_map = read_object(index, model).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise ModelError(f"model '{model}': {index.name} has no weight_map from tensors to files; save the model again")
    outside = next((shard for shard in weight_map.values() if Path(shard).name != shard or "\0" in shard), None)
    if outside is not None:
        raise ModelError(f"model '{model}': {index.name} names {outside!r}, which is no file of its own folder")
    return weight_map


def fingerprint(model: str) -> str:
    """Return a digest of the model's configuration and weights: names, sizes, headers, and samples of their bytes.

    It reads at most a quarter of a megabyte per file, so it costs little whatever the model's size; another training
    run's weights differ everywhere, so samples show them.
    """
    from transformers.utils.hub import cached_file

    try:
        folder = Path(cached_file(model, "config.json")).parent
    except OSError as error:
        raise ModelError(f"model '{model}': found no config.json to tell it from others by: {error}") from error
    digest = new_digest()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.index.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(SAMPLED_PLACES):
                file.seek(size * place // SAMPLED_PLACES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
