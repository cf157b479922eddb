"""A base of backends whose engine returns hidden states, which score with an LM head of their own."""

import asyncio
from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.contracts.columns import Bytes, Ints, Ragged
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
        self._num_rows = 0  # that were scored

    @abstractmethod
    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        """Return the states that predict the tokens whose mask is 1, and the values of other layers behind each."""

    async def score_rows(self, token_ids: Ragged, positions: Ragged, ids: Ints, layout: Layout) -> tuple[Ragged, int]:
        masks = [np.zeros(length, np.uint8) for length in token_ids.lengths]
        for row, mask in enumerate(masks):
            mask[positions[row] + 1] = 1
        first, self._num_rows = self._num_rows, self._num_rows + len(masks)
        read = (self.hidden_states(str(first + row), token_ids[row], mask) for row, mask in enumerate(masks))
        states, num_cached = zip(*await asyncio.gather(*read), strict=True)
        of_rows = np.split(ids, positions.offsets[1:-1])
        records = [self.records_of(own, wanted, layout) for own, wanted in zip(states, of_rows, strict=True)]
        return Ragged(np.concatenate(records), np.cumsum([0, *map(len, records)])), sum(num_cached)

    def records_of(self, states: torch.Tensor, ids: Ints, layout: Layout) -> NDArray[np.uint8]:
        ids = np.resize(ids, (len(states), ids.shape[1]))  # a faulty engine has another number of states
        shard = HeadShard.of(self.head)
        if self.shared_ids is not None:
            shared = torch.zeros(self.head.vocabulary_size).index_fill(0, torch.from_numpy(self.shared_ids).long(), 1.0)
            shard = HeadShard(*(getattr(shard, name) for name in list(HeadShard.__dataclass_fields__)[:-1]), shared)
        hidden, layers = states.split([self._head.width, self._layers_width], dim=-1)
        return score_positions(shard, hidden, layers, torch.from_numpy(ids), layout).numpy()
