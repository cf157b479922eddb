"""Defines the trajectories that a run keeps for people to read: which, with what columns, and in which files.

A kept row has the columns of a scored batch, but for hidden states, and what the learner knew of its completion tokens
in the step that learned from it. Lists of candidates and of top tokens are cut to `MOST_CANDIDATES`. Readers take the
columns that are there: signals and objectives decide which. All log-probabilities are natural, at temperature 1.

| column | meaning |
|---|---|
| `step` | that learned from it, from 1 |
| `reason` | `chosen` by its id alone, or `worst`: of all of the step, the largest log-ratio per token |
| `log_ratio` | mean over its tokens of sampler minus teacher log-probability |
| `token_texts` | one per token; of a character that several tokens make, the first has all |
| `MODEL_prompt_texts` | the same of a prompt that a scoring model read in the student's place |
| `vocabulary` | token id -> text, of all candidates and top tokens |
| `student_logprobs`, `student_entropy` | one per completion token |
| `loss`, `loss_weight`, `candidate_mass` | one per completion token: its loss, the weight of its place, p(candidates) |
| `student_candidate_logprobs` | one list per completion token, of `candidate_ids` |
| `MODEL_top_ids`, `MODEL_top_logprobs` | the model's most likely tokens, where its whole distribution was there |
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import feather

from cluster.contracts.arrow_files import write_arrow
from cluster.contracts.errors import CheckpointError

VERSION = "1"
MOST_CANDIDATES = 8
MIB = 1 << 20
_METADATA = b"preceptor.kept_rows"


@lru_cache(maxsize=4)  # asked for each row of a step
def chosen_ids(seed: int, step: int, num_trajectories: int, count: int) -> frozenset[int]:
    """Return the episodes of a step, from 0, whose rows are kept: a random choice that follows from the seed alone.

    Example:
        >>> sorted(chosen_ids(0, step=3, num_trajectories=4, count=9))
        [12, 13, 14, 15]
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    places = generator.choice(num_trajectories, min(count, num_trajectories), replace=False)
    return frozenset(step * num_trajectories + int(place) for place in places)


def is_kept(step: int, every: int) -> bool:
    """Return whether rows of a step, from 1, are kept: of the first, and of every so many.

    Example:
        >>> [step for step in range(1, 8) if is_kept(step, every=3)]
        [1, 3, 6]
    """
    return step == 1 or step % every == 0


@dataclass(frozen=True)
class Taken:
    """Holds what one rank of the learner has kept of a step, as Arrow IPC streams; None: nothing."""

    chosen: bytes | None
    worst: bytes | None
    seconds: float  # that encoding took


class KeptRowFiles:
    """Holds one Arrow file per step in a folder, `most_bytes` of them together.

    Where there would be more, every second of the steps kept so far is dropped, and of those that follow as many are
    kept: what stays covers the whole run evenly.
    """

    def __init__(self, folder: Path, most_bytes: float = math.inf) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._sizes = {step: _size(path) for step, path in self.files().items()}  # bytes
        later = [step for step in self._sizes if step > 1]
        self._stride = math.gcd(*later) if len(later) > 1 else 1

    def files(self) -> Mapping[int, Path]:
        """Return the files by their steps, in order."""
        paths = self._folder.glob("step-*.arrow") if self._folder.is_dir() else ()
        named = {path: path.stem.removeprefix("step-") for path in paths}
        return dict(sorted((int(step), path) for path, step in named.items() if step.isdecimal()))

    def wants(self, step: int) -> bool:
        return is_kept(step, self._stride)

    def write(self, step: int, rows: pa.Table) -> None:
        """Write the rows of a step, and drop others if there is no place for them."""
        metadata = {_METADATA: VERSION.encode()}
        self._sizes[step] = write_arrow(self._path(step), rows.to_batches(), rows.schema, metadata)
        while sum(self._sizes.values()) > self._most_bytes:
            self._stride *= 2
            alone = len(self._sizes) == 1
            self._drop([step for step in self._sizes if step % self._stride or alone])

    def drop_from(self, step: int) -> None:
        """Forget `step` and what followed: a resumed run does those steps again."""
        self._drop([written for written in self._sizes if written >= step])

    def read(self, steps: Collection[int] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Yield the rows of each step, or of some, in order; one that the run drops meanwhile is passed over.

        Raises:
            CheckpointError: a file is damaged, or of another release.
        """
        for step, path in self.files().items():
            if steps is not None and step not in steps:
                continue
            try:
                rows = feather.read_table(str(path), memory_map=False)
            except FileNotFoundError:
                continue
            except (pa.ArrowException, OSError) as error:
                raise CheckpointError(f"{path}: no kept rows: {error}; remove the file") from error
            version = (rows.schema.metadata or {}).get(_METADATA)
            if version != VERSION.encode():
                raise CheckpointError(f"{path}: kept rows of version {version!r}, expected {VERSION}; remove the file")
            yield step, rows

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            self._path(step).unlink(missing_ok=True)
            del self._sizes[step]

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.arrow"


def _size(path: Path) -> int:
    """Return a file's bytes; 0 of one that its run has dropped meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
