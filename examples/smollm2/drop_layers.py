"""Make a student from SmolLM2-135M-Instruct by leaving out some of its 30 layers.

What is left keeps the teacher's weights, tokenizer and chat template, so the student writes badly and learns fast.

    python -m examples.smollm2.drop_layers --keep 20
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cluster.contracts.errors import ModelError, PreceptorError

REMOVAL_ORDER = (14, 17, 16, 18, 13, 26, 19, 5, 3, 4, 15, 12)
"""Layers of the 30, cheapest to lose first, each chosen given the earlier ones; `order_layers.py` measured it."""

LAYER_NAME = re.compile(r"(?<=^model\.layers\.)\d+")


def main() -> None:
    """Write the student unless it is already there."""
    parser = argparse.ArgumentParser(description="Make a smaller student by leaving out layers of a model.")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-student"))
    parser.add_argument("--keep", type=int, default=20, help="layers to keep (default: 20)")
    arguments = parser.parse_args()
    try:
        write_student(arguments.model, arguments.output, arguments.keep)
    except PreceptorError as error:
        sys.exit(str(error))


def write_student(model_directory: Path, output: Path, num_kept: int) -> None:
    """Write the student directory, complete or not at all.

    Raises:
        ModelError: the model is missing or not of 30 layers, or `num_kept` is outside what was measured.
    """
    if output.exists():
        print(f"{output} is already there; delete it to make another student")
        return
    if not (model_directory / "config.json").exists():
        raise ModelError(f"{model_directory}: no model there; run `python -m examples.smollm2.get_weights` first")
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="auto")
    kept = layers_to_keep(model.config.num_hidden_layers, num_kept)
    student = with_layers(model, kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        directory = Path(scratch) / "student"
        student.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model_directory).save_pretrained(directory)
        directory.rename(output)
    millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    print(f"{output} written: {millions:.0f}M parameters, layers {kept}")


def layers_to_keep(num_layers: int, num_kept: int) -> list[int]:
    """Return the layers that stay, in ascending order.

    Raises:
        ModelError: the removal order was not measured for such a model, or not as far as `num_kept`.
    """
    fewest = 30 - len(REMOVAL_ORDER)
    if num_layers != 30:
        raise ModelError(f"the model has {num_layers} layers; the removal order was measured for SmolLM2-135M's 30")
    if not fewest <= num_kept < num_layers:
        raise ModelError(f"--keep is {num_kept}; it must be between {fewest} and {num_layers - 1}")
    return sorted(set(range(num_layers)) - set(REMOVAL_ORDER[: num_layers - num_kept]))


def with_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Return a model of only the kept layers, renumbered from 0, with the same weights and generation settings."""
    config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": len(kept)})
    smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller.load_state_dict(renumber(model.state_dict(), kept))
    smaller.tie_weights()
    smaller.generation_config = model.generation_config
    return smaller


def renumber(state: dict[str, torch.Tensor], kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """Leave out the layers that are not kept and number the rest from 0."""
    new_number = {str(layer): str(position) for position, layer in enumerate(kept)}
    renumbered = {}
    for name, weight in state.items():
        layer = LAYER_NAME.search(name)
        if layer is None or layer[0] in new_number:
            renumbered[LAYER_NAME.sub(lambda found: new_number[found[0]], name)] = weight
    return renumbered


if __name__ == "__main__":
    main()
