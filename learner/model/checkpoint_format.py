"""Brings the student's parameters into the form of its checkpoint, which rollout engines load and exports have.

transformers 5 trains some parameters in another form than checkpoints hold. The experts of a layer are one tensor, for
example, where a checkpoint has three per expert; vLLM knows the latter's names. transformers remembers how it converted
what it loaded, and its own function turns that back.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from cluster.contracts.errors import ModelError
from cluster.weight_sync.manifest import Manifest, TensorSpec


class CheckpointFormat:
    """Knows which tensors of a checkpoint a model's parameters become; tied parameters appear once.

    Build it before ZeRO-3 shards the model: what is left of a parameter then has no shape.

    Raises:
        ModelError: the conversion loses values.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self._causal_lm = causal_lm
        parameters = {name: torch.empty_like(one, device="meta") for name, one in causal_lm.named_parameters()}
        whole = self._revert(parameters)
        alone = {name: self._revert({name: one}) for name, one in parameters.items()}
        # What is at most called otherwise: transformers spends a regular expression or two on each.
        self._renamed = {
            name: tensor for name, became in alone.items() for tensor in became if became[tensor] is parameters[name]
        }
        # By each tensor's name: what it is made of, in the order in which all travel.
        self._parameters_of = {
            tensor: together for together in _sharing(alone) for name in together for tensor in alone[name]
        }
        self._shapes = {tensor: tuple(whole[tensor].shape) for tensor in self._parameters_of}
        if _num_values(parameters) != _num_values(whole):
            raise ModelError(
                f"student '{causal_lm.name_or_path}': transformers does not bring its parameters back into the form of "
                "their checkpoint, so no rollout engine could follow its training"
            )

    def manifest(self, dtype: str) -> Manifest:
        """Describe every tensor as it travels in the given dtype."""
        return [TensorSpec(name, shape, dtype, self._parameters_of[name][0]) for name, shape in self._shapes.items()]

    def parameters_of(self, names: Iterable[str]) -> list[str]:
        """Return the parameters that become these tensors of the checkpoint."""
        return list(dict.fromkeys(parameter for name in names for parameter in self._parameters_of[name]))

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole parameters or buffers in the checkpoint's form, as views where that is possible."""
        renamed = {self._renamed[name]: tensor for name, tensor in tensors.items() if name in self._renamed}
        others = {name: tensor for name, tensor in tensors.items() if name not in self._renamed}
        return renamed | (self._revert(others) if others else {})

    def _revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(self._causal_lm, dict(tensors))


def _sharing(names_of: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Put parameters together that become one tensor, in the order of the first of them."""
    groups: dict[str, list[str]] = {}  # by tensor
    for parameter, tensors in names_of.items():
        joined = {id(groups[tensor]): groups[tensor] for tensor in tensors if tensor in groups}
        together = [*(member for group in joined.values() for member in group), parameter]
        for member in together:
            groups |= dict.fromkeys(names_of[member], together)
    return [tuple(group) for group in {id(group): group for group in groups.values()}.values()]


def _num_values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
