"""What training changes in a rank, as named tensors: master weights, the optimizer's memory, random state.

All else (parameter groups, loss scaler, partitioning) follows from the configuration; a restored engine has its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.errors import CheckpointError

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
    """Return what `flatten` was given.

    Args:
        state: named tensors.
        weights: those that the state is for; its own must have the same shapes.

    Raises:
        CheckpointError: the state is of another model or optimizer.
    """
    found = [_checked(state, f"{position}.{WEIGHTS}", current) for position, current in enumerate(weights)]
    positions = {str(position): position for position in range(len(weights))}
    optimizer: OptimizerState = {}
    for name in state:
        prefix, _, key = name.partition(".")
        if prefix not in positions:
            raise CheckpointError(f"a shard holds {name!r}, which this student's engine does not have")
        if key != WEIGHTS:
            position = positions[prefix]
            optimizer.setdefault(position, {})[key] = _optimizer_value(state, name, weights[position])
    return found, optimizer


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's generators, from which layers draw."""
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def split_random_state(state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the generators' state, checked, and the rest.

    Raises:
        CheckpointError: a generator's state is missing or is none.
    """
    generators = {name: _checked(state, name, current) for name, current in random_state().items()}
    return generators, {name: tensor for name, tensor in state.items() if name not in generators}


def set_random_state(generators: Tensors) -> None:
    """Put torch's generators where they were."""
    torch.set_rng_state(generators["random.cpu"])
    if "random.cuda" in generators:
        torch.cuda.set_rng_state(generators["random.cuda"])


def _optimizer_value(state: Tensors, name: str, weights: Tensor) -> Any:
    value = state[name]
    if value.dim():
        return _checked(state, name, weights)
    return value.item() if value.dtype == torch.int64 else value  # torch counts its steps in float tensors


def _checked(state: Tensors, name: str, like: Tensor) -> Tensor:
    found = state.get(name)
    if found is None:
        raise CheckpointError(f"a shard lacks {name!r}, which this student's engine has")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise CheckpointError(
            f"a shard's {name!r} is {found.dtype} of {list(found.shape)}, where this student's engine has {like.dtype} "
            f"of {list(like.shape)}; resume with the student that the run was started with"
        )
    return found
