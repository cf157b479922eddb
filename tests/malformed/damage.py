"""Ways to damage a model directory that was whole."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
Spoil = Callable[[Path], object]


def both(first: Spoil, second: Spoil) -> Spoil:
    def spoil(model: Path) -> None:
        first(model)
        second(model)

    return spoil


def without(*names: str) -> Spoil:
    def spoil(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return spoil


def holding(name: str, content: bytes | str) -> Spoil:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def linked_to_itself(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink()
        (model / name).symlink_to(name)

    return spoil


def a_folder(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return spoil


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(model: Path) -> None:
        found = json.loads((model / name).read_text())
        change(found)
        (model / name).write_text(json.dumps(found))

    return spoil


def configured(**fields: Any) -> Spoil:
    return edited("config.json", lambda config: config.update(fields))


def cut(name: str, kept: int) -> Spoil:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:kept])


def bytes_replaced(old: bytes, new: bytes) -> Spoil:
    return lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes().replace(old, new, 1))


def header_replaced(header: bytes) -> Spoil:
    return holding(WEIGHTS, struct.pack("<Q", len(header)) + header)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(model: Path) -> None:
        found = load_file(model / WEIGHTS)
        change(found)
        save_file(found, model / WEIGHTS, metadata={"format": "pt"})

    return spoil


def as_pickle(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        torch.save(load_file(model / WEIGHTS), model / name)
        (model / WEIGHTS).unlink()

    return spoil


def in_shards(change: Callable[[Path, dict[str, Any]], object]) -> Spoil:
    """Save in two files and an index, then damage them."""

    def spoil(model: Path) -> None:
        found = load_file(model / WEIGHTS)
        (model / WEIGHTS).unlink()
        names = sorted(found)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for shard, inside in parts.items():
            save_file({name: found[name] for name in inside}, model / shard, metadata={"format": "pt"})
        index = {"weight_map": {name: shard for shard, inside in parts.items() for name in inside}}
        change(model, index)
        (model / INDEX).write_text(json.dumps(index))

    return spoil


def first_shard(model: Path) -> Path:
    return model / "a.safetensors"


def rows(count: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: found.update({EMBEDDING: found[EMBEDDING][:count].clone()})


def another_head(found: dict[str, torch.Tensor]) -> None:
    """Add a head that differs from the embedding in its last row alone."""
    head = found[EMBEDDING].clone()
    head[-1] += 1
    found["lm_head.weight"] = head


def adapter() -> Spoil:
    """Leave what peft saves, which is an adapter alone."""

    def spoil(model: Path) -> None:
        without("config.json", "generation_config.json", WEIGHTS)(model)
        (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-8B"}')
        save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, model / "adapter_model.safetensors")

    return spoil
