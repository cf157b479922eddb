"""A small causal model as a teacher backend, and backends that are wrong in one way each.

A module of its own, so that Ray can import it.
"""

import asyncio
import math

import numpy as np
import torch

from cluster.config.stages import Dtype
from cluster.contracts.trajectory import Bytes, Ints
from cluster.models.lm_head import LmHead
from teacher_workers.actor import TeacherWorker
from tests.teacher_workers.hidden_states import HiddenStatesBackend

VOCABULARY, WIDTH = 112, 16


class RightEngine(HiddenStatesBackend):
    """A recurrent network with random weights: a position's state depends on all tokens up to it, and on no other."""

    def __init__(self, dtype: Dtype = "float32", seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self._dtype = getattr(torch, dtype)
        self._embedding = torch.randn(VOCABULARY, WIDTH, generator=draw)
        self._recurrence = 0.8 * torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw)).Q
        super().__init__(LmHead(torch.randn(VOCABULARY, WIDTH, generator=draw).to(self._dtype)))

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        return self.read(token_ids, loss_mask).to(self._dtype), 0

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        """Return the states that predict the tokens whose mask is 1."""
        return self.states(token_ids)[np.flatnonzero(loss_mask) - 1]

    def states(self, token_ids: Ints) -> torch.Tensor:
        """Return the state of every position."""
        state, states = torch.zeros(WIDTH), []
        for token in token_ids.tolist():
            state = torch.tanh(self._recurrence @ state + self._embedding[token])
            states.append(state)
        return torch.stack(states)


class TooLate(RightEngine):
    """Gives each token the state of the position that has read it."""

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        return self.states(token_ids)[np.flatnonzero(loss_mask)]


class TooEarly(RightEngine):
    """Gives each token the state of two positions before it."""

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        return self.states(token_ids)[np.maximum(np.flatnonzero(loss_mask) - 2, 0)]


class Constant(RightEngine):
    """Gives every position the same state, and the head one row: the softmax of equal logits."""

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        return torch.zeros(int(loss_mask.sum()), WIDTH)


class Nan(RightEngine):
    """Has one NaN."""

    value = math.nan

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        states = super().read(token_ids, loss_mask)
        states[-1, 0] = self.value
        return states


class PlusInfinity(Nan):
    """Has one infinity."""

    value = math.inf


class MinusInfinity(Nan):
    """Has one negative infinity."""

    value = -math.inf


class TooShort(RightEngine):
    """Lacks the last state."""

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        return super().read(token_ids, loss_mask)[:-1]


class TooLong(RightEngine):
    """Has the last state twice."""

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        states = super().read(token_ids, loss_mask)
        return torch.cat([states, states[-1:]])


class OneMoreOneLess(RightEngine):
    """Gives the first row's last state to the second one: the batch has as many as it needs."""

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        states = self.read(token_ids, loss_mask)
        change = {0: states[:-1], 1: torch.cat([states[:1], states])}
        return change.get(int(request_id) % 4, states), 0


class Swapped(RightEngine):
    """Gives rows of one batch that are of the same length each other's states."""

    def __init__(self, dtype: Dtype = "float32", seed: int = 0) -> None:
        super().__init__(dtype, seed)
        self._together: list[torch.Tensor] = []

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        together, place = self._together, len(self._together)
        together.append(self.read(token_ids, loss_mask).to(self._dtype))
        await asyncio.sleep(0)  # the batch's other rows come
        self._together = []
        alike = [index for index, states in enumerate(together) if len(states) == len(together[place])]
        return together[alike[-1 - alike.index(place)]], 0


class Hot(RightEngine):
    """Divides its logits by a temperature."""

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        return super().read(token_ids, loss_mask) / 1.5


class Noisy(RightEngine):
    """Rounds otherwise each time, as another batch composition does."""

    def __init__(self, dtype: Dtype = "float32", seed: int = 0, noise: float = 3e-5) -> None:
        super().__init__(dtype, seed)
        self._noise = noise
        self._draw = torch.Generator().manual_seed(100 + seed)

    def read(self, token_ids: Ints, loss_mask: Bytes) -> torch.Tensor:
        states = super().read(token_ids, loss_mask)
        return states * (1 + self._noise * torch.randn(states.shape, generator=self._draw))


def make_worker(name: str, engine: RightEngine) -> TeacherWorker:
    return TeacherWorker(name, engine)
