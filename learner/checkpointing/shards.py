"""Writes and reads files of tensors, one per rank: safetensors and nothing else, written beside training."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cluster.contracts.errors import CheckpointError
from cluster.weight_sync.manifest import new_digest
from learner.checkpointing.manifest import FileEntry, WrittenShard, file_errors

Tensors = Mapping[str, Tensor]
WEIGHTS = "weights"
OptimizerState = dict[int, dict[str, Any]]  # position of the weights -> name -> tensor or number


def flatten(weights: Sequence[Tensor], optimizer: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Name everything, as POSITION.weights and POSITION.KEY; numbers become tensors without dimensions.

    Example:
        >>> sorted(flatten([torch.zeros(3)], {0: {"step": 7, "exp_avg": torch.ones(3)}}))
        ['0.exp_avg', '0.step', '0.weights']
    """
    named = {f"{position}.{WEIGHTS}": tensor for position, tensor in enumerate(weights)}
    for position, values in optimizer.items():
        named |= {f"{position}.{key}": torch.as_tensor(value) for key, value in values.items()}
    return named


def unflatten(state: Tensors, weights: Sequence[Tensor]) -> tuple[list[Tensor], OptimizerState]:
    """Return what `flatten` was given; raise CheckpointError if it does not fit `weights`, which it is for."""
    restored = [_checked(state, f"{position}.{WEIGHTS}", current) for position, current in enumerate(weights)]
    positions = {str(position): position for position in range(len(weights))}
    optimizer: OptimizerState = {}
    for name in state:
        prefix, _, key = name.partition(".")
        if prefix not in positions:
            raise CheckpointError(f"a shard holds {name!r}, which this student's engine does not have")
        if key != WEIGHTS:
            position = positions[prefix]
            optimizer.setdefault(position, {})[key] = _optimizer_value(state, name, weights[position])
    return restored, optimizer


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's generators, from which layers draw."""
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def split_random_state(state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the generators' state, checked, and the rest."""
    generators = {name: _checked(state, name, current) for name, current in random_state().items()}
    return generators, {name: tensor for name, tensor in state.items() if name not in generators}


def set_random_state(generators: Tensors) -> None:
    torch.set_rng_state(generators["random.cpu"])
    if "random.cuda" in generators:
        torch.cuda.set_rng_state(generators["random.cuda"])


def _optimizer_value(state: Tensors, name: str, weights: Tensor) -> Any:
    value = state[name]
    if value.dim():
        return _checked(state, name, weights)
    return value.item() if value.dtype == torch.int64 else value  # torch counts its steps in float tensors


def _checked(state: Tensors, name: str, like: Tensor) -> Tensor:
    tensor = state.get(name)
    if tensor is None:
        raise CheckpointError(f"a shard lacks {name!r}, which this student's engine has")
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise CheckpointError(
            f"a shard's {name!r} is {tensor.dtype} of {list(tensor.shape)}, where this student's engine has "
            f"{like.dtype} of {list(like.shape)}; resume with the student that the run was started with"
        )
    return tensor


CHUNK_BYTES = 1 << 24  # hashed and written in turns, so that neither keeps the other from the bytes
_HEADER_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, where training does not change them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write host tensors to a new safetensors file, bring it to disk, and return what the manifest says of it.

    safetensors' own writer keeps Python's lock for much of the time, and training would wait for it.
    """
    digest, num_bytes = new_digest(), 0
    with path.open("xb") as file:
        for chunk in _chunks(tensors):
            digest.update(chunk)
            num_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.name, num_bytes, digest.hexdigest())


def read_shard(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in memory of their own; raise CheckpointError if it is none."""
    try:
        # Copied out of the file's mapping, which pruning a checkpoint may take away.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        what = f"{path.name} is no readable safetensors file: {' '.join(str(error).split())}"
        raise CheckpointError(f"checkpoint {path.parent}: {what}") from error


class ShardWriter:
    """Writes one file at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard")
        self._path: Path
        self._writing: Future[WrittenShard]
        self._is_begun = False

    def begin(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write host tensors that do not change any more."""
        if self._is_begun:
            wait([self._writing])  # of a checkpoint that was given up
        self._path, self._writing = path, self._thread.submit(_write_timed, path, tensors)
        self._is_begun = True

    @property
    def is_done(self) -> bool:
        """Return whether the file is written, or cannot be."""
        return self._writing.done()

    def finish(self) -> WrittenShard:
        """Wait for the file and return what was written; raise CheckpointError if it cannot be written."""
        with file_errors(f"checkpoint {self._path.parent}: cannot write {self._path.name}"):
            return self._writing.result()


def _write_timed(path: Path, tensors: Mapping[str, Tensor]) -> WrittenShard:
    started = perf_counter()
    return WrittenShard(write_shard(path, tensors), perf_counter() - started)


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Give the bytes of a safetensors file: the header's length, the header, and the values without gaps."""
    # Wide values first: each tensor then begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        values = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(values), CHUNK_BYTES):
            yield values[start : start + CHUNK_BYTES]
