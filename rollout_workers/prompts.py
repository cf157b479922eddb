"""Reads prompt files, tokenises them, and fixes the order in which a run uses them.

A prompt file is JSONL, one object per line: `prompt` (a text, or a list of chat messages), and optionally `answer`,
`domain` and `teacher` (the NAME of a [teachers.NAME] section; needed when there are several).
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
from jinja2 import TemplateError

from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError, PromptError
from cluster.contracts.files import read_file
from cluster.contracts.trajectory import ragged
from rollout_workers.environments.base import Prompt
from rollout_workers.environments.verifiers import check_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LINE_BYTES = 1 << 24  # more text than any context holds; tokenising it would only take long
# A chat template is a program of the model's author, and what it does to messages can fail in as many ways.
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=True),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
    ]
)


class PromptLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reads one line of a prompt file."""

    prompt: str | list[dict[str, Any]]
    answer: str | None = None
    domain: str = ""
    teacher: str | None = None


class PromptSet:
    """Holds tokenised prompts; prompt_id is the index. All rollout workers share its wire form."""

    def __init__(self, table: pa.RecordBatch) -> None:
        self._table = table
        self._token_ids = ragged(table, "token_ids")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def longest_tokens(self) -> int:
        return int(self._token_ids.lengths.max(initial=0))

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
        columns = ("text", "teacher", "domain", "answer")
        return Prompt(self._token_ids[prompt_id], *(self._table[name][prompt_id].as_py() for name in columns))

    def to_wire(self) -> pa.Buffer:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _SCHEMA) as writer:
            writer.write_batch(self._table)
        return sink.getvalue()

    @classmethod
    def join(cls, parts: "Iterable[PromptSet]") -> "PromptSet":
        """Return one set with the parts' prompts in order; ids of a later part follow those of the earlier."""
        table = pa.Table.from_batches([part._table for part in parts], _SCHEMA).combine_chunks()
        return cls(table.to_batches()[0])

    @classmethod
    def of_token_ids(cls, token_ids: "Sequence[Sequence[int]]", teacher: str) -> "PromptSet":
        """Return prompts of given tokens, without texts or answers, all of one teacher."""
        nothing = [""] * len(token_ids)
        columns = {"token_ids": token_ids, "text": nothing, "answer": [None] * len(token_ids), "domain": nothing}
        return cls(pa.RecordBatch.from_pydict({**columns, "teacher": [teacher] * len(token_ids)}, schema=_SCHEMA))

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


def load_prompts(path: Path, tokenizer: "PreTrainedTokenizerBase", config: Config, context_tokens: int) -> PromptSet:
    """Read a prompt file and tokenise it; `context_tokens` is the shortest context among all engines of the run.

    Raises:
        PromptError: the file is missing or empty, or a line is malformed or does not fit; names file and line.
    """
    content = read_file(path, "prompt file", PromptError)
    if not content:
        raise PromptError(f"{path}: the file holds no prompt")
    lines: list[tuple[str, PromptLine]] = []  # and where each stands
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path}:{number}"
        lines.append((where, _parse(where, line, config.environment.verifier)))
    # One call for all of them: called once per prompt, a tokenizer spends its time in Python.
    texts = [_render(where, parsed, tokenizer, config) for where, parsed in lines]
    token_ids = tokenizer(texts, add_special_tokens=config.prompts.template == "raw")["input_ids"]
    for (where, _), ids in zip(lines, token_ids, strict=True):
        _check_length(where, len(ids), config, context_tokens)
    columns = {
        "token_ids": token_ids,
        "text": [_last_message(parsed) for _, parsed in lines],
        "answer": [parsed.answer for _, parsed in lines],
        "domain": [parsed.domain for _, parsed in lines],
        "teacher": [_route(where, parsed.teacher, config.routes) for where, parsed in lines],
    }
    return PromptSet(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))


def _parse(where: str, line: bytes, verifier: str) -> PromptLine:
    if not line.strip():
        raise PromptError(f"{where}: the line is empty")
    if len(line) > MAX_LINE_BYTES:
        raise PromptError(
            f"{where}: the line has {len(line)} bytes; expected one JSON object of up to {MAX_LINE_BYTES}"
        )
    try:
        parsed = msgspec.json.decode(line, type=PromptLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PromptError(f"{where}: not a prompt object: {error}") from error
    if not isinstance(parsed.prompt, str):
        _check_messages(where, parsed.prompt)
    elif not parsed.prompt.strip():
        raise PromptError(f"{where}: `prompt` is empty")
    try:
        if parsed.answer is not None:
            check_answer(verifier, parsed.answer)
    except ConfigError as error:
        raise PromptError(f"{where}: {error}") from error
    return parsed


def _check_messages(where: str, messages: list[dict[str, Any]]) -> None:
    """Check what every chat template reads: a template that finds no content leaves it out without a word."""
    if not messages:
        raise PromptError(f"{where}: `prompt` is empty")
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise PromptError(f"{where}: message {number} has role {role!r}; expected a text such as 'user'")
        if not (isinstance(content, str | list) and content) and not message.get("tool_calls"):
            raise PromptError(f"{where}: message {number} has content {content!r}; expected a text that is not empty")


def _check_length(where: str, tokens: int, config: Config, context_tokens: int) -> None:
    if not tokens:
        raise PromptError(f"{where}: the prompt has no tokens; the student needs one to go on from")
    completion, observations = config.rollout.max_completion_tokens, config.environment.max_observation_tokens
    longest = context_tokens - completion - observations - 1  # a scoring engine generates one token
    if tokens > longest:
        less = f"rollout.max_completion_tokens = {completion}"
        if observations:
            less += f", environment.max_observation_tokens = {observations}"
        raise PromptError(
            f"{where}: the prompt has {tokens} tokens, but a context of {context_tokens} less {less} and 1 leaves "
            f"room for {longest}"
        )


def _render(where: str, line: PromptLine, tokenizer: "PreTrainedTokenizerBase", config: Config) -> str:
    """Return the text that the student reads; a chat template writes its own special tokens."""
    if config.prompts.template == "raw":
        if not isinstance(line.prompt, str):
            raise PromptError(f"{where}: `prompt` is a conversation, but prompts.template = 'raw' takes a text")
        return line.prompt
    if tokenizer.chat_template is None:
        raise PromptError(f"{where}: the student's tokenizer has no chat template; set prompts.template = 'raw'")
    messages = [{"role": "user", "content": line.prompt}] if isinstance(line.prompt, str) else list(line.prompt)
    if config.prompts.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.prompts.system_prompt})
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except _TEMPLATE_ERRORS as error:
        raise PromptError(f"{where}: the chat template of the student refuses the prompt: {error}") from error


def _last_message(line: PromptLine) -> str:
    return line.prompt if isinstance(line.prompt, str) else str(line.prompt[-1].get("content", ""))


def _route(where: str, teacher: str | None, names: Sequence[str]) -> str:
    if teacher is None and len(names) == 1:
        return names[0]
    if teacher is None or teacher not in names:
        raise PromptError(f"{where}: teacher is {teacher!r}; expected one of {names}")
    return teacher
