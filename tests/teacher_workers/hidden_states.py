"""A base of backends whose engine returns hidden states, which score with an LM head of their own."""

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.contracts.trajectory import Bytes, Ints
from cluster.models.lm_head import HeadFacts, LmHead
from cluster.models.token_scores import HeadShard, Layout, score_positions
from teacher_workers.backends.scored_rows import ScoredRowsBackend


class HiddenStatesBackend(ScoredRowsBackend):
    """Applies a head to hidden states that a subclass computes."""

    def __init__(self, head: LmHead, layers_width: int = 0) -> None:
        excluded = () if head.excluded_ids is None else tuple(head.excluded_ids.tolist())
        width, dtype = head.weight.shape[1], str(head.weight.dtype).removeprefix("torch.")
        scaling = (head.logit_factor, head.softcap)
        facts = HeadFacts(head.name, head.vocabulary_size, width, False, *scaling, excluded, head.stop_class)
        super().__init__(facts, dtype, layers_width)  # type: ignore[arg-type]
        self.head = head

    @abstractmethod
    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        """Return the states that predict the tokens whose mask is 1, and the values of other layers behind each."""

    async def score_row(
        self, request_id: str, token_ids: Ints, positions: Ints, ids: Ints, layout: Layout
    ) -> tuple[NDArray[np.uint8], int]:
        mask = np.zeros(len(token_ids), np.uint8)
        mask[positions + 1] = 1
        states, num_cached = await self.hidden_states(request_id, token_ids, mask)
        ids = np.resize(ids, (len(states), ids.shape[1]))  # a faulty engine has another number of states
        shard = HeadShard.of(self.head)
        if self.shared_ids is not None:
            shared = torch.zeros(self.head.vocabulary_size).index_fill(0, torch.from_numpy(self.shared_ids).long(), 1.0)
            shard = HeadShard(*(getattr(shard, name) for name in list(HeadShard.__dataclass_fields__)[:-1]), shared)
        hidden, layers = states.split([self._head.width, self._layers_width], dim=-1)
        return score_positions(shard, hidden, layers, torch.from_numpy(ids), layout).numpy(), num_cached
