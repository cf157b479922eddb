"""Keeps a few of the trajectories that a rank learns from, with what the student and whole distributions say of them.

The forward of the step computes all of it anyway: the few tokens of a kept row are read where their logits lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.config.run_config import Config
from cluster.config.terms import TEACHER
from cluster.contracts.kept_rows import MOST_CANDIDATES, Taken, chosen_ids, is_kept
from cluster.contracts.metrics import Sum
from cluster.contracts.trajectory import ragged, sampled_columns
from learner.batching.micro_batch import MicroBatch, Trajectory
from learner.batching.plan import Grid
from learner.loss.tokens import CompletionTokens, Evaluation

Columns = dict[str, NDArray[Any]]  # name -> [completion_tokens] or [completion_tokens, k]


@dataclass(frozen=True)
class WatchedRow:
    """Names a trajectory of a micro-batch that may be kept."""

    index: int  # among the rows that the micro-batch was built from
    tokens: range  # its completion tokens among the micro-batch's
    log_ratio: float
    is_chosen: bool  # by its id; else it is the worst so far


@dataclass
class Watch:
    """Reads, in one forward, what is known of some rows' completion tokens."""

    rows: Sequence[WatchedRow]
    seconds: float  # that choosing and reading took
    _parts: list[dict[str, Tensor]] = field(default_factory=list)

    @cached_property
    def places(self) -> Tensor:
        """Return the rows' completion tokens in the micro-batch, [m]."""
        return torch.tensor([place for row in self.rows for place in row.tokens])

    @torch.no_grad()
    def see(
        self, places: Tensor, logits: Tensor, tokens: CompletionTokens, weights: Tensor, models: Mapping[str, Tensor]
    ) -> None:
        """Read a chunk before its logits are overwritten.

        Args:
            places: [n] of the chunk's completion tokens in the micro-batch.
            logits: [n, vocabulary] of the student.
            tokens, weights: the chunk's tokens and their weights, [n].
            models: whole distributions of others, as logits [n, their vocabulary].
        """
        began = perf_counter()
        kept = torch.isin(places, self.places.to(places.device))
        part = {"places": places[kept], "loss_weight": weights[kept]}
        for model, values in {"student": logits, **models}.items():
            rows = values[kept].float()
            logprobs = rows - rows.logsumexp(-1, keepdim=True)
            top = logprobs.topk(min(MOST_CANDIDATES, logprobs.shape[-1]))
            part |= {f"{model}_top_logprobs": top.values, f"{model}_top_ids": top.indices}
            if model == "student" and tokens.candidate_ids.shape[-1]:
                ids = tokens.candidate_ids[kept][:, :MOST_CANDIDATES]
                of_candidates = logprobs.gather(-1, ids.clamp(max=logprobs.shape[-1] - 1))
                part["student_candidate_logprobs"] = of_candidates.masked_fill(ids >= logprobs.shape[-1], -torch.inf)
        self._parts.append(part)
        self.seconds += perf_counter() - began

    def columns(self, result: Evaluation) -> Columns:
        """Return what was read, and what the step made of it, once the micro-batch is evaluated."""
        seen = {name: torch.cat([part[name] for part in self._parts]).cpu() for name in self._parts[0]}
        order = seen.pop("places").argsort()
        places = self.places.to(result.losses.device)
        of_step = torch.stack([result.losses, result.logprobs, result.entropy, result.candidate_mass])[:, places].cpu()
        names = ("loss", "student_logprobs", "student_entropy", "candidate_mass")
        columns = {name: values[order].numpy() for name, values in seen.items()}
        return columns | dict(zip(names, of_step.numpy(), strict=True))


@dataclass(frozen=True)
class KeptRow:
    """Holds one trajectory and the columns that have its completion tokens among others'."""

    scored: pa.RecordBatch  # one row, a view
    log_ratio: float
    columns: Columns
    tokens: slice  # of the columns


class KeptRows:
    """Holds one rank's kept rows of the step under way."""

    def __init__(self, config: Config) -> None:
        self._count, self._seed = config.logging.kept_rows, config.run.seed
        self._every = config.logging.kept_every_steps
        self._per_step = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
        self._step = -1  # whose rows these are
        self._chosen: list[KeptRow] = []
        self._worst: list[KeptRow] = []  # at most one
        self._largest_ratio = -np.inf

    def watch(self, batch: MicroBatch, grid: Grid, rows: Sequence[Trajectory]) -> MicroBatch:
        """Return the micro-batch with a watch on the rows of its grid that are kept; without one if none is."""
        began = perf_counter()
        indices = [index for grid_row in grid for index in grid_row]
        if not self._count or not len(batch.tokens):
            return batch
        own = [index for index in indices if not rows[index].privileged]
        if not own:  # rows of a privileged sampler are far from the student by intent, and none is kept
            return batch
        step = rows[own[0]].episode_id // self._per_step
        if not is_kept(step + 1, self._every):
            return batch
        if step != self._step:
            self._begin(step)
        chosen = chosen_ids(self._seed, step, self._per_step, self._count)
        lengths = [len(rows[index].rollout_logprobs) for index in indices]
        ratios = log_ratios(batch.tokens, lengths)
        ratios[[rows[index].privileged for index in indices]] = -np.inf
        worst, start, watched = int(ratios.argmax()), 0, []
        for place, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            is_chosen = rows[index].episode_id in chosen
            if length and (is_chosen or (place == worst and ratios[place] > self._largest_ratio)):
                watched.append(WatchedRow(index, range(start, start + length), float(ratios[place]), is_chosen))
            start += length
        return replace(batch, watch=Watch(watched, perf_counter() - began)) if watched else batch

    def add(self, watch: Watch, result: Evaluation, batches: Sequence[pa.RecordBatch]) -> dict[str, Sum]:
        """Keep what a watch has read; `batches` hold the rows, in order. Return how long it all took, as a metric."""
        began = perf_counter()
        ends = np.cumsum([batch.num_rows for batch in batches])
        columns, start = watch.columns(result), 0
        names = narrow_columns(batches[0].schema)  # those of all batches of a step
        for row in watch.rows:
            number = int(np.searchsorted(ends, row.index, side="right"))
            scored = batches[number].select(names).slice(row.index - (int(ends[number - 1]) if number else 0), 1)
            kept = KeptRow(scored, row.log_ratio, columns, slice(start, start + len(row.tokens)))
            start += len(row.tokens)
            if row.is_chosen:
                self._chosen.append(kept)
            if row.log_ratio > self._largest_ratio:
                self._worst, self._largest_ratio = [kept], row.log_ratio
        return {"kept_rows_seconds": Sum(watch.seconds + perf_counter() - began)}

    def take(self) -> Taken:
        """Return the rows, and begin anew."""
        began = perf_counter()
        taken = Taken(_to_ipc(self._chosen), _to_ipc(self._worst), perf_counter() - began)
        self._begin(-1)
        return taken

    def _begin(self, step: int) -> None:
        """Forget what was kept before."""
        self._step, self._chosen, self._worst, self._largest_ratio = step, [], [], -np.inf


def log_ratios(tokens: CompletionTokens, lengths: Sequence[int]) -> NDArray[np.float64]:
    """Return each trajectory's mean of sampler minus teacher log-probability, in nats; -inf without tokens."""
    ratios = (tokens.rollout_logprobs - tokens.logprobs[TEACHER]).double().numpy()
    sums = np.bincount(tokens.trajectory.numpy(), ratios, len(lengths))
    return np.where(np.array(lengths) > 0, sums / np.maximum(lengths, 1), -np.inf)


def narrow_columns(schema: pa.Schema) -> list[str]:
    """Return the columns but for those of a model's own width, which are most of the bytes."""
    signals = sampled_columns(schema)
    return [name for name in schema.names if name not in signals or signals[name].width != "model"]


def _to_ipc(rows: Sequence[KeptRow]) -> bytes | None:
    """Encode scored rows with their further columns."""
    if not rows:
        return None
    scored = pa.concat_batches([row.scored for row in rows])
    arrays = {name: scored[name] for name in scored.schema.names}
    for name in arrays:
        kind = scored.schema.field(name).type
        if pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type):
            column = ragged(scored, name)
            arrays[name] = _lists(column.values[:, :MOST_CANDIDATES], column.lengths)
    arrays["log_ratio"] = pa.array([row.log_ratio for row in rows], pa.float32())
    lengths = np.array([row.tokens.stop - row.tokens.start for row in rows])
    for name in rows[0].columns:
        arrays[name] = _lists(np.concatenate([row.columns[name][row.tokens] for row in rows]), lengths)
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _lists(values: NDArray[Any], lengths: NDArray[np.int64]) -> pa.Array:
    """Return a list column: per row so many values, or lists of values, one per token."""
    values = values.astype(np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32)
    items = pa.array(values.reshape(-1))
    if values.ndim == 2:
        items = pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], items)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), items)
