"""Holds the tokenised prompts of a run, and fixes the order in which a run uses them."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.contracts.errors import PromptError
from cluster.contracts.trajectory import Ints, ragged
from cluster.weight_sync.manifest import checksum
from rollout_workers.environments.base import Prompt
from rollout_workers.prompt_row import PromptRow

_SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=True),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("columns", pa.string(), nullable=True),  # further columns as a JSON object
        # As the prompt's teacher reads it, where that has a tokenizer of its own.
        pa.field("teacher_token_ids", pa.list_(pa.int32()), nullable=True),
        pa.field("source", pa.string(), nullable=True),  # the whole row as JSON, where contexts or turns are made of it
    ]
)


class PromptSet:
    """Holds tokenised prompts; prompt_id is the index. All rollout workers share its wire form."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self._table = table
        self._token_ids = ragged(table, "token_ids")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def longest_tokens(self) -> int:
        return int(self.lengths.max(initial=0))

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each prompt."""
        return self._token_ids.lengths

    @property
    def checksum(self) -> str:
        """Return a digest of the prompts' tokens, answers and teachers."""
        labels = msgspec.json.encode([self._table[name].to_pylist() for name in ("answer", "teacher")])
        return checksum([self.lengths.tobytes(), self._token_ids.values.tobytes(), labels])

    def num_shared(self, others: "PromptSet") -> int:
        """Return how many of these prompts have the tokens of one of the others."""
        return int(pc.sum(pc.is_in(self._as_bytes(), others._as_bytes())).as_py() or 0)

    def _as_bytes(self) -> pa.Array:
        offsets = self._token_ids.offsets.astype(np.int64) * np.dtype(np.int32).itemsize
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(self._token_ids.values, np.int32))]
        return pa.Array.from_buffers(pa.large_binary(), len(self), buffers)

    def text(self, prompt_id: int) -> str:
        """Return the prompt as its file gives it; of a conversation, the last message."""
        return str(self._table["text"][prompt_id].as_py())

    def domain(self, prompt_id: int) -> str:
        """Return the label under which metrics group this prompt."""
        return str(self._table["domain"][prompt_id].as_py())

    def teacher(self, prompt_id: int) -> str:
        """Return the name of the teacher that scores this prompt's completions."""
        return str(self._table["teacher"][prompt_id].as_py())

    def prompt(self, prompt_id: int) -> Prompt:
        names = ("text", "teacher", "domain", "answer", "columns")
        text, teacher, domain, answer, columns = (self._table[name][prompt_id].as_py() for name in names)
        further = {} if columns is None else msgspec.json.decode(columns)
        own = self._table["teacher_token_ids"][prompt_id].as_py()
        of_teacher = None if own is None else np.array(own, np.int32)
        source = self._table["source"][prompt_id].as_py()
        row = None if source is None else msgspec.json.decode(source, type=PromptRow)
        return Prompt(self._token_ids[prompt_id], text, teacher, domain, answer, further, of_teacher, row)

    def without_teachers_tokens(self) -> "PromptSet":
        """Return the prompts as the student reads them, for its teachers too."""
        position = _SCHEMA.get_field_index("teacher_token_ids")
        nothing = pa.nulls(len(self), _SCHEMA.field(position).type)
        return PromptSet(self._table.set_column(position, _SCHEMA.field(position), nothing))

    def longest_of(self, teacher: str) -> int:
        """Return the tokens of the longest prompt that a teacher with its own tokenizer reads."""
        own = zip(self._table["teacher"].to_pylist(), self._table["teacher_token_ids"], strict=True)
        return max((len(ids) for name, ids in own if name == teacher and ids.is_valid), default=0)

    def source(self, prompt_id: int) -> PromptRow:
        """Return the row of the file; raise PromptError if the prompts were read without, for no context needs it."""
        row = self.prompt(prompt_id).row
        if row is None:
            raise PromptError(f"prompt {prompt_id} was read without the row that a teacher's context is made of")
        return row

    def to_wire(self) -> pa.Buffer:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _SCHEMA) as writer:
            writer.write_batch(self._table)
        return sink.getvalue()

    def with_token_ids(self, changed: Mapping[int, Ints]) -> "PromptSet":
        """Return the same prompts, some of them, by their ids, with other tokens."""
        token_ids = [changed.get(number, self._token_ids[number]) for number in range(len(self))]
        column = pa.array(token_ids, type=_SCHEMA.field("token_ids").type)
        return PromptSet(self._table.set_column(0, _SCHEMA.field("token_ids"), column))

    @classmethod
    def join(cls, parts: "Iterable[PromptSet]") -> "PromptSet":
        """Return one set with the parts' prompts in order; ids of a later part follow those of the earlier."""
        table = pa.Table.from_batches([part._table for part in parts], _SCHEMA).combine_chunks()
        return cls(table.to_batches()[0])

    @classmethod
    def of_columns(cls, columns: Mapping[str, Sequence[Any]]) -> "PromptSet":
        """Return prompts from their columns by name; each has one value per prompt."""
        absent = [None] * len(columns["token_ids"])
        optional = {"source": absent, "teacher_token_ids": absent}
        return cls(pa.RecordBatch.from_pydict({**optional, **columns}, schema=_SCHEMA))

    @classmethod
    def of_token_ids(cls, token_ids: "Sequence[Sequence[int]]", teacher: str) -> "PromptSet":
        """Return prompts of given tokens, without texts or answers, all of one teacher."""
        nothing, absent = [""] * len(token_ids), [None] * len(token_ids)
        teachers = [teacher] * len(token_ids)
        values = (token_ids, nothing, absent, nothing, teachers, absent, absent, absent)
        return cls.of_columns(dict(zip(_SCHEMA.names, values, strict=True)))

    @classmethod
    def from_wire(cls, wire: pa.Buffer) -> "PromptSet":
        """Decode `to_wire`'s bytes without copying the values."""
        with pa.ipc.open_stream(wire) as reader:
            return cls(reader.read_next_batch())


@dataclass(frozen=True)
class PromptOrder:
    """Orders the prompts of a run: a pure function of the seed, so a resumed run needs no saved cursor."""

    num_prompts: int
    seed: int
    shuffle: bool

    def take(self, first: int, count: int) -> list[int]:
        """Return the prompt ids of admissions `first` to `first + count - 1`; epochs follow one another."""
        ids: list[int] = []
        while len(ids) < count:
            epoch, position = divmod(first + len(ids), self.num_prompts)
            ids.extend(self._epoch(epoch)[position : position + count - len(ids)].tolist())
        return ids

    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_prompts)


def sampling_seed(*key: int) -> int:
    """Return a seed: the same for the same key (run seed, purpose, step, prompt id, sample index), else independent."""
    digest = blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # vLLM takes signed 64-bit seeds


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of one completion of a trajectory, from the trajectory's own, which the first completion has."""
    return sampling_seed(seed, turn) if turn else seed
