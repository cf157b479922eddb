"""Chooses which recorded rows each step learns from, and brings them into the object store as batches.

A step's rows follow from the record, its filter and the run's seed alone, as live requests follow from the prompts: a
resumed run does a step again with the same rows, and `preceptor verify` finds them in the ledger.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.actors.cluster import RAY, Cluster
from cluster.actors.object_store import pack
from cluster.config.replay import replayed_prompts, replays_signals
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.stages import ROLLOUT_ENGINES
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import CheckpointError, ConfigError, PromptError
from cluster.contracts.metrics import Max, Mean, Metric, Sum
from cluster.contracts.recorded_rows import CHECKSUM_DIGITS, RecordedRows, as_trajectories, open_recorded
from cluster.contracts.requests import RolloutRequest
from cluster.contracts.trajectory import generated_schema, prompted_models_in, ragged
from cluster.run.replay_checks import STUDENTS_CANDIDATES, check_columns, check_settings
from rollout_workers.prompts import PromptOrder, sampling_seed

PLACE = ("step", "batch", "row")
VERSIONS = ("min_policy_version", "max_policy_version")
INDEX = (*PLACE, "episode_id", "trajectory_id", "prompt_id", "sample_index", *VERSIONS)
OPEN_FILES = 16
REMEMBERED_STEPS = 4  # whose rows the loop, the ledger and the flow ask for one after the other


@dataclass(frozen=True)
class Place:
    """Finds a recorded batch."""

    path: Path
    number: int  # of the Arrow batch in the file


@dataclass(frozen=True)
class Chosen:
    """Names one row that a step replays."""

    place: Place
    order: tuple[int, int, int]  # step, batch and row: where it came among all rows of the record
    request: RolloutRequest  # with the episode's id of this run
    further: int  # what its own id is above that: it is a further row of the episode
    versions: tuple[int, int]  # of the recorded run


class Replay:
    """Holds the record that a run replays, as far as its filter lets it through."""

    def __init__(self, config: Config, cluster: Cluster = RAY) -> None:
        """Read the index of the record.

        Raises:
            CheckpointError: nothing is recorded there, or a file is damaged.
            ConfigError: the filter leaves nothing, or the record was made with settings that the run cannot learn from.
        """
        settings = config.rollout.replay
        assert settings is not None, "the run replays rows"
        self.settings, self._config, self._cluster = settings, config, cluster
        self.directory = RunDirectory.open(Path(settings.run))
        self._recorded = RecordedRows(self.directory.rows)
        self._samples, self._per_step = config.rollout.samples_per_prompt, config.prompts.prompts_per_step
        self._num_replayed = replayed_prompts(config)
        index = self._recorded.table(INDEX, settings.where)
        if not index.num_rows:
            raise ConfigError(f"rollout.replay.where = '{settings.where}' holds for no row of {settings.run}")
        self._index = {name: index[name].to_numpy().astype(np.int64) for name in INDEX}
        check_settings(config, self.directory.read_config())
        self._files = self._find_batches()
        self._strips = settings.signals == "recomputed"
        self._thread = ThreadPoolExecutor(1, "replay")
        self._ahead: dict[int, Future[list[BatchHandle]]] = {}  # the next step's rows
        self._open = lru_cache(OPEN_FILES)(open_recorded)
        self.chosen = lru_cache(REMEMBERED_STEPS)(self._chosen)

    @cached_property
    def units(self) -> list[NDArray[np.int64]]:
        """Return the places in the index of each prompt's samples, in the order in which they were requested."""
        index = self._index
        group = index["episode_id"] // self._samples
        order = np.lexsort((index["row"], index["batch"], group, index["step"]))
        is_first = (np.diff(group[order]) != 0) | (np.diff(index["step"][order]) != 0)
        return np.split(order, np.flatnonzero(is_first) + 1)

    @cached_property
    def order(self) -> PromptOrder:
        return PromptOrder(len(self.units), self._config.run.seed, self.settings.shuffle)

    @property
    def num_rows(self) -> int:
        return len(self._index["step"])

    def epoch(self, step: int) -> int:
        """Return in which pass over the rows a step, from 0, begins, from 0."""
        return step * self._num_replayed // len(self.units)

    def requests(self, step: int) -> list[RolloutRequest]:
        """Return what stands for the rows of a step, from 0, in the ledger; seeds are of their content."""
        of_ids = {row.request.trajectory_id: row.request for row in self.chosen(step)}
        return [of_ids[one] for one in sorted(of_ids)]

    def versions(self, step: int) -> tuple[int, int]:
        """Return the lowest and the highest policy version, of the recorded run, that sampled a row of a step."""
        versions = [version for row in self.chosen(step) for version in row.versions]
        return min(versions), max(versions)

    def read(self, step: int, generated: bool | None = None) -> list[BatchHandle]:
        """Put a step's rows into the object store, in the batches that were recorded, and return their handles.

        They come without teachers' columns where they are `generated`; None: as the settings say, and those of the next
        step are read beside this one.
        """
        if generated is not None:
            return self._load(step, generated)
        ahead = self._ahead.pop(step, None) or self._thread.submit(self._load, step, self._strips)
        self._ahead.clear()
        if step + 1 < self._config.run.steps:
            self._ahead[step + 1] = self._thread.submit(self._load, step + 1, self._strips)
        return ahead.result()

    def check_prompts(self, checksum: str) -> None:
        """Raise PromptError if the run has other prompts than the record."""
        for paths in self._recorded.files().values():
            origin, _ = open_recorded(paths[0])
            if origin.prompts != checksum:
                raise PromptError(
                    f"rollout.replay.run = '{self.settings.run}': step {origin.step} was recorded with other prompts "
                    "(file, chat template, tokenizer or setting, also of held-out ones); take the same [prompts]"
                )

    def _load(self, step: int, strips: bool) -> list[BatchHandle]:
        of_batches: dict[Place, list[Chosen]] = defaultdict(list)
        for row in self.chosen(step):
            of_batches[row.place].append(row)
        return [self._handle(step, place, rows, strips) for place, rows in of_batches.items()]

    def _chosen(self, step: int) -> tuple[Chosen, ...]:
        """Return the rows of a step, from 0, in the order in which they were learned from."""
        first = (step + 1) * self._per_step - self._num_replayed  # after the prompts that are sampled
        units = self.order.take(step * self._num_replayed, self._num_replayed)
        rows = [self._choose(index, first + n) for n, unit in enumerate(units) for index in self.units[unit]]
        return tuple(sorted(rows, key=lambda row: (row.order, row.request.trajectory_id)))

    def _choose(self, index: np.int64, position: int) -> Chosen:
        values = {name: int(column[index]) for name, column in self._index.items()}
        place = self._files[values["step"], values["batch"]]
        content = int(place.path.stem[-CHECKSUM_DIGITS:], 16) >> 1
        request = RolloutRequest(
            position * self._samples + values["episode_id"] % self._samples,
            values["prompt_id"],
            values["sample_index"],
            sampling_seed(content, place.number, values["row"]),
        )
        oldest, newest = (values[name] for name in VERSIONS)
        order = values["step"], values["batch"], values["row"]
        return Chosen(place, order, request, values["trajectory_id"] - values["episode_id"], (oldest, newest))

    def _handle(self, step: int, place: Place, chosen: Sequence[Chosen], strips: bool) -> BatchHandle:
        origin, reader = self._open(place.path, check=True)
        rows = as_trajectories(reader.get_batch(place.number))
        numbers = [row.order[2] for row in chosen]
        if numbers != list(range(rows.num_rows)):
            rows = rows.take(numbers)
        for name, ids in (
            ("episode_id", [row.request.trajectory_id for row in chosen]),
            ("trajectory_id", [row.request.trajectory_id + row.further for row in chosen]),
        ):
            place_of = rows.schema.get_field_index(name)
            rows = rows.set_column(place_of, rows.schema.field(name), pa.array(ids, pa.int64()))
        if strips:
            rows = as_generated(rows, keeps_candidates=self._config.objective.needs.candidates_from == "student")
        pieces, handle = pack(rows, _metrics(rows))
        scored_by = {} if strips else origin.scored_by or {handle.teacher: "unknown"}
        reference = self._cluster.put(pieces)
        return replace(handle, reference=reference, rollout=step, is_replayed=True, scored_by=scored_by)

    def _find_batches(self) -> Mapping[tuple[int, int], Place]:
        """Return where each batch of each step lies, and check that every file and step is whole and of use."""
        places, counts, expected, kinds = {}, Counter[int](), dict[int, int](), set()
        for path in (path for paths in self._recorded.files().values() for path in paths):
            origin, reader = open_recorded(path)
            kind = reader.schema.to_string(), tuple(origin.scored_by.items())
            if kind not in kinds:
                check_columns(self._config, origin, reader)
                kinds.add(kind)
            options = pa.ipc.IpcReadOptions(included_fields=[reader.schema.get_field_index("batch")])
            narrow = pa.ipc.open_file(pa.memory_map(str(path)), options=options)
            for number in range(narrow.num_record_batches):
                batch = narrow.get_batch(number)["batch"]
                places[origin.step, batch[0].as_py()] = Place(path, number)
                counts[origin.step] += len(batch)
            expected[origin.step] = origin.step_rows
        for step, num_rows in expected.items():
            if counts[step] != num_rows:
                raise CheckpointError(
                    f"{self._recorded.folder}: {counts[step]} of the {num_rows} rows of step {step} are there; restore "
                    "the files, or wait until the step is recorded"
                )
        return places


def without_idle_workers(config: Config, has_held_out: bool) -> Config:
    """Return the run without the workers that a replay of all rows has no use for.

    Held-out prompts need rollout workers, but no teacher; and so do teachers that score in their engines.
    """
    replay = config.rollout.replay
    if replay is None or replay.share < 1:
        return config
    rollout, teachers, audit = config.rollout, config.teachers, config.score_audit
    scores_there = any(teacher.backend == ROLLOUT_ENGINES for teacher in teachers.values())
    if not has_held_out and not (scores_there and replay.signals == "recomputed"):
        rollout = msgspec.structs.replace(rollout, num_workers=0)
    if replays_signals(config):
        teachers = {name: msgspec.structs.replace(teacher, num_workers=0) for name, teacher in teachers.items()}
        audit = msgspec.structs.replace(audit, rows=0)
    return msgspec.structs.replace(config, rollout=rollout, teachers=teachers, score_audit=audit)


def live(config: Config) -> Config:
    """Return the run as it would sample all rows."""
    return msgspec.structs.replace(config, rollout=msgspec.structs.replace(config.rollout, replay=None))


def as_generated(rows: pa.RecordBatch, keeps_candidates: bool) -> pa.RecordBatch:
    """Return rows as no teacher has scored them; the student's own candidates stay if they are kept."""
    names = set(rows.schema.names)
    candidates = rows.schema.field(STUDENTS_CANDIDATES).type.value_type.list_size if STUDENTS_CANDIDATES in names else 0
    schema = generated_schema(candidates if keeps_candidates else 0, prompted_models_in(rows.schema))
    return pa.record_batch([rows[name] for name in schema.names], schema=schema)


def _metrics(rows: pa.RecordBatch) -> dict[str, Metric]:
    """Measure a batch as the worker does that samples one; nothing was generated, so no tokens or seconds count."""
    lengths, num_rows = ragged(rows, "rollout_logprobs").lengths, float(rows.num_rows)
    cut = pc.sum(pc.equal(rows["finish_reason"], "length")).as_py()
    rewards = rows["reward"].drop_null().to_numpy()
    metrics: dict[str, Metric] = {
        "replay/rows": Sum(num_rows),
        "rollout/completion_length": Mean(float(lengths.sum()), num_rows),
        "rollout/completion_length_max": Max(float(lengths.max())),
        "rollout/truncated_ratio": Mean(float(cut), num_rows),
    }
    return metrics | ({"rollout/reward": Mean(float(rewards.sum()), float(len(rewards)))} if len(rewards) else {})
