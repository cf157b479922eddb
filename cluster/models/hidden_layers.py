"""Says which layers' hidden states are compared, and projects them: the part of OPRD that teacher and learner share.

Layer l is what stands after l blocks, from 1; the last one is taken after the final norm, as the LM head reads it. That
is transformers' numbering of `hidden_states`, whose entry 0 is the embedding.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.contracts.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["student", "teacher"]
KIND = "preceptor-projection-bank-1"  # in the file's metadata; another number if the meaning of a tensor changes
TENSORS = tuple(f"{side}.{part}" for side in ("student", "teacher") for part in ("projections", "means"))


def chosen_layers(layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the layers of a model of so many blocks that "last", "all" or a list names.

    Raises:
        ModelError: the model has no such layer.

    Example:
        >>> chosen_layers("last", 24), chosen_layers([12, 24], 24)
        ((24,), (12, 24))
    """
    if isinstance(layers, str):
        return tuple(range(1, depth + 1)) if layers == "all" else (depth,)
    if missing := [layer for layer in layers if layer > depth]:
        raise ModelError(f"a representation term names layer {missing[0]} of the student, which has {depth}")
    return tuple(layers)


def paired_layers(layers: Sequence[int], depth: int, other_depth: int) -> tuple[int, ...]:
    """Return the layers of a model of another depth that stand at the same relative depth.

    The first is paired with the first, the last with the last: OPRD's rule (its
    `linspace(0, teacher_depth - 1, student_depth).round()`), in which a half goes to the even neighbour.

    Example:
        >>> paired_layers((1, 2, 4), depth=4, other_depth=8)
        (1, 3, 8)
    """
    stride = (other_depth - 1) / max(1, depth - 1)
    return tuple(other_depth if layer == depth else 1 + round((layer - 1) * stride) for layer in layers)


@dataclass(frozen=True)
class ProjectionBank:
    """Maps layers of two models into one space of few dimensions (OPRD-Bridge), fitted once and frozen.

    A row of a layer's `projections` [layers, rank, width] is a direction; states are taken from their `means`
    [layers, width] first. Everything is float32.
    """

    layers: dict[Side, tuple[int, ...]]  # entry i of one side is compared with entry i of the other
    depths: dict[Side, int]
    projections: "dict[Side, Tensor]"
    means: "dict[Side, Tensor]"

    @property
    def rank(self) -> int:
        return int(self.projections["teacher"].shape[1])

    def width(self, side: Side) -> int:
        return int(self.projections[side].shape[2])

    @cached_property
    def digest(self) -> str:
        """Return the hash of layers and values, which the file holds and a run records."""
        digest = hashlib.sha256(json.dumps([self.layers, self.depths], sort_keys=True).encode())
        for values in self._tensors().values():
            digest.update(str(tuple(values.shape)).encode() + values.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def project(self, side: Side, layer: int, states: "Tensor") -> "Tensor":
        """Map one layer's states [n, width] to [n, rank], in their dtype but at least in float32; autograd follows."""
        place = self.layers[side].index(layer)
        import torch

        wide = states if states.dtype == torch.float64 else states.float()
        mean, projection = (part[side][place].to(wide) for part in (self.means, self.projections))
        return (wide - mean) @ projection.T

    def select(self, layers: Sequence[int]) -> "ProjectionBank":
        """Return the bank of some of the student's layers; raise ModelError if it was not fitted for one of them."""
        if missing := [layer for layer in layers if layer not in self.layers["student"]]:
            fitted = ", ".join(map(str, self.layers["student"]))
            raise ModelError(f"the projection bank was fitted for layers {fitted} of the student, not for {missing[0]}")
        places = [self.layers["student"].index(layer) for layer in layers]
        return ProjectionBank(
            {side: tuple(of_side[place] for place in places) for side, of_side in self.layers.items()},
            self.depths,
            {side: values[places] for side, values in self.projections.items()},
            {side: values[places] for side, values in self.means.items()},
        )

    def save(self, path: Path) -> None:
        """Write it as safetensors, whole or not at all."""
        from safetensors.torch import save_file

        metadata = {"kind": KIND, "layers": json.dumps(self.layers), "depths": json.dumps(self.depths)}
        partial = path.with_name(f"{path.name}.partial")
        values = {name: tensor.clone() for name, tensor in self._tensors().items()}  # none of another's memory
        save_file(values, partial, metadata | {"digest": self.digest})
        partial.replace(path)

    def _tensors(self) -> "dict[str, Tensor]":
        parts = {"projections": self.projections, "means": self.means}
        return {name: parts[part][side] for name in TENSORS for side, part in [name.split(".")]}  # type: ignore[index]


def load_bank(path: str, digest: str = "") -> ProjectionBank:
    """Read a bank, of this digest if one is given.

    Raises:
        ModelError: it is missing, damaged, another one or something else; says how to make one.
    """
    from safetensors import SafetensorError, safe_open

    advice = "make it with `preceptor fit-projection`"
    if not Path(path).is_file():
        raise ModelError(f"projection bank '{path}': there is no such file; {advice}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ModelError(f"projection bank '{path}': is another kind of file; {advice}")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        layers, depths = json.loads(metadata["layers"]), json.loads(metadata["depths"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(f"projection bank '{path}': cannot be read ({error}); {advice}") from error
    bank = ProjectionBank(
        {side: tuple(of_side) for side, of_side in layers.items()},
        depths,
        {side: tensors[f"{side}.projections"] for side in layers},
        {side: tensors[f"{side}.means"] for side in layers},
    )
    if bank.digest != metadata.get("digest"):
        raise ModelError(f"projection bank '{path}': its values are not those it was written with; {advice} again")
    if digest and bank.digest != digest:
        raise ModelError(f"projection bank '{path}': is another one on this node than on the driver's; copy it there")
    return bank
