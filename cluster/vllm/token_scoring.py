"""Lets a pooling engine of vLLM score tokens in its worker, where the hidden states are.

vLLM's pooling models leave their LM head out and return hidden states. `scoring_tokens` changes how vLLM turns a causal
LM into an embedder of tokens: the model then keeps this rank's part of the head (`ArrivingHead`), which it copies out
of the weights as they are loaded, at the start and with every update; and the last step of its pooler (`ScoringHead`)
answers requests that say which tokens to score with records of `cluster/models/token_scores.py`. Requests that say
nothing get hidden states, as from vLLM itself.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.contracts.columns import Ints, Ragged
from cluster.contracts.errors import ModelError
from cluster.models.lm_head import HeadFacts, LmHead, multiplies_wide
from cluster.models.token_scores import HeadShard, Layout, chunk_size, rows_of_rank, score_positions
from cluster.vllm.engine import SCORING_KEY, LayersToSend
from cluster.vllm.layer_states import LayerStates
from cluster.vllm.weight_sync.updates import UpdateCalls

SCORING_CALLS = f"{__name__}.ScoringCalls"  # as vLLM names classes
RANDOM_STD = 0.02  # of the head where weights are not loaded but drawn, for benchmarks


@dataclass(frozen=True)
class Scoring:
    """Says what an engine's model scores tokens with."""

    head: HeadFacts | None = None  # None: it returns hidden states
    layers: LayersToSend | None = None  # behind the last hidden states


def batch_request(token_ids: Ragged, positions: Ragged, ids: Ints, layout: Layout) -> dict[str, Any]:
    """Return what a request says of the rows of a batch, in PoolingParams.extra_kwargs.

    Of each row, the positions [n], at least one, predict the ids [n, 1 + given] of the layout.
    """
    arrays = {
        "token_ids": token_ids.values,
        "token_offsets": token_ids.offsets,
        "positions": positions.values,
        "position_offsets": positions.offsets,
        "ids": ids,
    }
    return {name: values.astype(np.int32).tobytes() for name, values in arrays.items()} | {"layout": list(layout)}


def rows_in(request: Mapping[str, Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Return of each row its token ids, and what its own request says to `ScoringHead`."""
    arrays = {name: np.frombuffer(values, np.int32) for name, values in request.items() if name != "layout"}
    layout, token_ids, positions = Layout(*request["layout"]), arrays["token_ids"].tolist(), arrays["positions"]
    ids = arrays["ids"].reshape(len(positions), 1 + layout.num_given)
    spans, of_positions = (pairwise(arrays[name].tolist()) for name in ("token_offsets", "position_offsets"))
    for (first, last), (begin, end) in zip(spans, of_positions, strict=True):
        yield token_ids[first:last], {"positions": positions[begin:end], "ids": ids[begin:end], "layout": layout}


def pack_answer(records: Sequence[Tensor], num_cached: int) -> Tensor:
    """Return the records [n, bytes] of all rows as bytes, behind the number of cached positions and those of rows."""
    # By numpy: torch wakes its threads to copy a few kilobytes.
    header = np.array([num_cached, *map(len, records)], np.int32).view(np.uint8)
    return torch.from_numpy(np.concatenate([header, *(of_row.numpy().reshape(-1) for of_row in records)]))


def unpack_answer(answer: NDArray[np.uint8], num_rows: int) -> tuple[Ragged, int]:
    """Return the records [total, bytes] of so many rows, and the number of cached positions.

    Example:
        >>> records = [torch.full((2, 4), 7, dtype=torch.uint8), torch.ones(1, 4, dtype=torch.uint8)]
        >>> of_rows, num_cached = unpack_answer(pack_answer(records, 16).numpy(), 2)
        >>> of_rows.offsets.tolist(), of_rows[1].tolist(), num_cached
        ([0, 2, 3], [[1, 1, 1, 1]], 16)
    """
    num_cached, *counts = answer[: 4 * (1 + num_rows)].view(np.int32).tolist()
    return Ragged(answer[4 * (1 + num_rows) :].reshape(sum(counts), -1), np.cumsum([0, *counts])), num_cached


def scoring_tokens(convert: Callable[[type], type]) -> Callable[[type], type]:
    """Return a conversion into an embedder of tokens that scores them too, where its engine's configuration says so."""

    def converted(model_class: type) -> type:
        embedder: Any = convert(model_class)

        class ScoresTokens(embedder):
            def __init__(self, *, vllm_config: Any, prefix: str = "", **arguments: Any) -> None:
                super().__init__(vllm_config=vllm_config, prefix=prefix, **arguments)
                # Here, for vLLM keeps the class for other engines of the process.
                scoring = msgspec.convert(vllm_config.additional_config.get(SCORING_KEY, {}), Scoring)
                self._layer_states = None
                if scoring.layers is not None:
                    depth = vllm_config.model_config.hf_text_config.num_hidden_layers
                    self._layer_states = LayerStates(self, depth, scoring.layers)
                self.arriving_head = make_head(scoring.head, vllm_config) if scoring.head else None
                if self.arriving_head is not None:
                    pooler = self.pooler.poolers_by_task["token_embed"]
                    pooler.head = ScoringHead(pooler.head, self.arriving_head)

            def forward(self, *arguments: Any, **named: Any) -> Any:
                output = super().forward(*arguments, **named)
                return output if self._layer_states is None else self._layer_states.beside(output)

            def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
                if self.arriving_head is None:
                    return super().load_weights(weights)
                loaded = super().load_weights(self.arriving_head.read(weights))
                self.arriving_head.check_loaded()
                return loaded

        ScoresTokens.__name__ = embedder.__name__
        return ScoresTokens

    converted.scores_tokens = True  # type: ignore[attr-defined]
    return converted


def make_head(facts: HeadFacts, vllm_config: Any) -> "ArrivingHead":
    """Allocate this rank's part of the head, on the device that the model is made on."""
    from vllm.distributed.communication_op import tensor_model_parallel_all_gather
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    num_ranks = get_tensor_model_parallel_world_size()
    first, last = rows_of_rank(facts.vocabulary_size, get_tensor_model_parallel_rank(), num_ranks)
    dtype = vllm_config.model_config.dtype
    if multiplies_wide(dtype, torch.empty(0).device):
        dtype = torch.float32
    weight = torch.empty(last - first, facts.width, dtype=dtype)
    head = facts.make(weight, torch.empty(last - first, dtype=dtype) if facts.has_bias else None)
    gather = {} if num_ranks == 1 else {"gather": tensor_model_parallel_all_gather}
    arriving = ArrivingHead(HeadShard.of(head, first, facts.vocabulary_size, **gather))
    if vllm_config.load_config.load_format == "dummy":
        arriving.fill_at_random()
    return arriving


class ArrivingHead:
    """Holds a rank's part of the LM head, and takes its values from the weights that the model loads."""

    def __init__(self, shard: HeadShard) -> None:
        self.shard = shard
        self._is_loaded = False  # for the first time
        self.begin()

    def begin(self) -> None:
        """Expect all values anew."""
        # By the names of the model's files. Those of an update may have another prefix; and a model has other heads,
        # with longer names, where it predicts several tokens.
        self._sources: dict[str, str] = {}

    def read(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass on weights of the model's checkpoint, and copy those of the head."""
        head = self.shard.rows
        for name, values in weights:
            own = head.own_name(name)
            if own is not None and self._sources.get(own) != own:
                self._copy(head, own, values)
                self._sources[own] = name
            yield name, values

    def fault(self) -> str | None:
        """Say what has not arrived, as half a sentence."""
        head = self.shard.rows
        missing = [name for name in head.names if name not in self._sources]
        return f"the update lacks the teacher's LM head, '{missing[0]}'" if missing else None

    def check_loaded(self) -> None:
        """Raise ModelError if the files have been loaded without the head."""
        if not self._is_loaded and self.fault() is not None:
            raise ModelError(f"vLLM did not load the LM head '{self.shard.rows.name}' from the model's files")
        self._is_loaded = True

    def fill_at_random(self) -> None:
        """Draw the values, for a model that is not loaded."""
        for values in (self.shard.rows.weight, self.shard.rows.bias):
            if values is not None:
                values.normal_(std=RANDOM_STD)

    def set_shared_ids(self, token_ids: Sequence[int]) -> None:
        """Take the tokens whose mass requests may ask for."""
        mask = torch.zeros(self.shard.vocabulary_size)
        mask[torch.tensor(token_ids)] = 1.0
        weight = self.shard.rows.weight
        own = mask[self.shard.first : self.shard.first + len(weight)]
        self.shard = replace(self.shard, shared=own.to(weight.device))

    def _copy(self, head: LmHead, name: str, values: Tensor) -> None:
        to = head.weight if name == head.name else head.bias
        assert to is not None, "a head without a bias has one name"
        to.copy_(values[self.shard.first : self.shard.first + len(to)])


class ScoringHead(nn.Module):
    """Ends a pooler of tokens: turns each request's hidden states into what it asks for."""

    def __init__(self, plain: Any, head: ArrivingHead) -> None:
        """Take vLLM's own end of the pooler, which serves requests for hidden states."""
        super().__init__()
        self._plain, self._arriving = plain, head
        self._is_warm = False

    def forward(self, pooled: list[Tensor | None], metadata: Any) -> list[Tensor | None]:
        """Return hidden states or records of each request; None of those that vLLM has not read to their end."""
        wanted = [params.extra_kwargs for params in metadata.pooling_params]
        outputs: list[Tensor | None] = self._plain(pooled, metadata) if None in wanted else [None] * len(pooled)
        if not self._is_warm:
            self._warm_up()
        places: dict[Layout, list[int]] = {}
        for place, request in enumerate(wanted):
            if pooled[place] is not None and request is not None:
                places.setdefault(request["layout"], []).append(place)
        lengths = metadata.prompt_lens.tolist()
        for layout, alike in places.items():
            requests = [(pooled[place], lengths[place], wanted[place]) for place in alike]
            for place, records in zip(alike, self._records(requests, layout), strict=True):
                outputs[place] = records
        return outputs

    def _records(self, requests: Sequence[tuple[Any, int, Any]], layout: Layout) -> Sequence[Tensor]:
        """Return each request's records; none of a request with a position that vLLM took from its prefix cache."""
        states, ids = [], []
        for computed, num_tokens, request in requests:
            positions = request["positions"] - (num_tokens - len(computed))
            if positions[0] < 0:  # the first; they ascend
                positions = positions[:0]
            states.append(_rows_at(computed, positions))
            ids.append(request["ids"][: len(positions)])
        rows = torch.cat(states)
        width = self._arriving.shard.rows.weight.shape[1]
        hidden, layers = rows.split([width, rows.shape[1] - width], dim=-1)
        records = score_positions(self._arriving.shard, hidden, layers, torch.from_numpy(np.concatenate(ids)), layout)
        return records.split([len(own) for own in states])

    def _warm_up(self) -> None:
        """Take the memory of a chunk once, while vLLM measures what it may give to its cache."""
        self._is_warm = True
        head = self._arriving.shard.rows
        if head.weight.is_cuda:
            hidden = head.weight.new_zeros(chunk_size(head), head.weight.shape[1])
            ids = torch.zeros(len(hidden), 1, dtype=torch.int64)
            score_positions(self._arriving.shard, hidden, hidden[:, :0], ids, Layout(top_k=1, entropy=True))


def _rows_at(states: Tensor, positions: Ints) -> Tensor:
    """Return some rows of [tokens, width], without a copy where they follow each other."""
    if len(positions) and positions[-1] - positions[0] == len(positions) - 1:
        return states[int(positions[0]) : int(positions[-1]) + 1]
    return states[torch.from_numpy(positions.astype(np.int64)).to(states.device)]


class ScoringCalls(UpdateCalls):
    """Adds the calls about the LM head to those about new weights."""

    get_model: Callable[[], Any]

    def begin_update(self) -> None:
        self.get_model().arriving_head.begin()
        super().begin_update()

    def finish_and_report(self) -> dict[str, Any]:
        report = super().finish_and_report()
        return report | {"fault": report["fault"] or self.get_model().arriving_head.fault()}

    def set_shared_ids(self, token_ids: bytes) -> None:
        """Take int32 ids."""
        self.get_model().arriving_head.set_shared_ids(np.frombuffer(token_ids, np.int32).tolist())
