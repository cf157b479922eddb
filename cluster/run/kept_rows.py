"""Writes the trajectories that the learner keeps of each step, with the texts of their tokens, beside the loop."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.actors.cluster import RAY, Cluster
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import PreceptorError
from cluster.contracts.files import Record
from cluster.contracts.kept_rows import MIB, KeptRowFiles, Taken, is_kept
from cluster.models.model_files import load_tokenizer
from cluster.run.hooks import RunContext, StepHook

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WAIT_SECONDS = 60.0  # the ranks answer before they begin the next step
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to
MOST_TOKENS_OF_A_CHARACTER = 8
MOST_TRIED = 1000

_log = logging.getLogger("preceptor")


class KeptRows(StepHook):
    """Collects each step's kept rows from the learner's ranks, and writes them in a thread of its own."""

    def __init__(self, run: RunContext, cluster: Cluster = RAY) -> None:
        super().__init__(run)
        self._cluster = cluster
        logging_config, student = run.config.logging, run.config.student
        self._files = KeptRowFiles(run.directory.kept_rows, logging_config.kept_mib * MIB)
        self._files.drop_from(run.first_step + 1)
        self._is_on, self._every = logging_config.kept_rows > 0, logging_config.kept_every_steps
        self._thread = ThreadPoolExecutor(1, "kept-rows")
        self._texts = self._thread.submit(lambda: TokenTexts(load_tokenizer(student.model, student.trust_remote_code)))
        self._writing: list[Future[float]] = []

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Ask the ranks for their rows, and return what writing them has worked since the step before, in seconds."""
        if not (self._is_on and is_kept(step, self._every)):
            return {}
        done = [write for write in self._writing if write.done()]
        self._writing = [write for write in self._writing if write not in done]
        references = self.run.pipeline.learner.take_kept_rows()
        if self._files.wants(step):
            self._writing.append(self._thread.submit(self._write, step, references))
        return {"kept_rows/write_seconds": sum(write.result() for write in done)}

    def end(self, error: BaseException | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=error is not None)

    def _write(self, step: int, references: Sequence[Any]) -> float:
        """Write one step's rows; return the processor's seconds. A failure leaves the step out, and the run goes on."""
        try:
            answers: list[Taken] = self._cluster.get(list(references), WAIT_SECONDS, "kept rows")
            began = time.thread_time()
            if (rows := join(answers)) is not None:
                self._files.write(step, self._texts.result().add_to(rows, step))
            return time.thread_time() - began + sum(taken.seconds for taken in answers)
        except (PreceptorError, OSError, pa.ArrowException) as error:
            _log.warning("the kept rows of step %d are not written: %s", step, error)
            return 0.0


def join(answers: Sequence[Taken]) -> pa.Table | None:
    """Return the rows of all ranks: those chosen, and of each rank's worst the worst; None if there are none."""
    tables = [_table(taken.chosen, "chosen") for taken in answers if taken.chosen is not None]
    ids = {one for rows in tables for one in rows["trajectory_id"].to_pylist()}
    worst = [_table(taken.worst, "worst") for taken in answers if taken.worst is not None]
    worst = sorted(worst, key=lambda row: row["log_ratio"][0].as_py())[-1:]
    tables += [row for row in worst if row["trajectory_id"][0].as_py() not in ids]
    return pa.concat_tables(tables).combine_chunks().sort_by("trajectory_id") if tables else None


def _table(rows: bytes, reason: str) -> pa.Table:
    with pa.ipc.open_stream(rows) as reader:
        table = reader.read_all()
    return table.add_column(0, "reason", pa.array([reason] * table.num_rows))


class TokenTexts:
    """Says what tokens look like to people."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor, self._anchor_text = _plain_token(tokenizer)

    def add_to(self, rows: pa.Table, step: int) -> pa.Table:
        """Return the rows with their step and the texts of their tokens."""
        for name in rows.column_names:
            if name.endswith("_ids") and _is_list(rows[name].type, pa.types.is_int32):  # of scorers' own prompts too
                texts = [self.of_sequence(ids) for ids in rows[name].to_pylist()]
                rows = rows.append_column(f"{name.removesuffix('_ids')}_texts", pa.array(texts, pa.list_(pa.string())))
        chosen = [name for name in rows.column_names if name.endswith("_ids")]
        names = [name for name in chosen if _is_list(rows[name].type, pa.types.is_list)]
        vocabularies = []
        for row in range(rows.num_rows):
            ids = {int(one) for name in names for one in rows[name][row].values.flatten().to_numpy()}
            vocabularies.append([(one, self.of_token(one)) for one in sorted(ids)])
        rows = rows.append_column("step", pa.array([step] * rows.num_rows, pa.int32()))
        return rows.append_column("vocabulary", pa.array(vocabularies, pa.map_(pa.int32(), pa.string())))

    def of_token(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = self._decode([token_id])
        return self._known[token_id]

    def of_sequence(self, ids: Sequence[int]) -> list[str]:
        """Return one text per token; of a character that several tokens make, the first has all and the rest none."""
        texts = [self.of_token(one) for one in ids]
        place = 0
        while place < len(texts):
            length = self._character_length(ids, texts, place)
            if length > 1:
                texts[place : place + length] = [self._decode(ids[place : place + length])] + [""] * (length - 1)
            place += length
        return texts

    def _character_length(self, ids: Sequence[int], texts: Sequence[str], place: int) -> int:
        """Return of how many tokens the character is that begins, or ends, in the token at a place."""
        if BROKEN not in texts[place]:
            return 1
        for length in range(2, min(MOST_TOKENS_OF_A_CHARACTER, len(ids) - place) + 1):
            if BROKEN not in self._decode(ids[place : place + length]):
                return length
        return 1

    def _decode(self, ids: Sequence[int]) -> str:
        """Decode as what follows other text: at the beginning, decoders drop a space, or put none between words."""
        text = str(self._tokenizer.decode([*self._anchor, *ids], clean_up_tokenization_spaces=False))
        return text[len(self._anchor_text) :]


def _plain_token(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], str]:
    """Return a token of plain text and its text; nothing if the first ones of the vocabulary are none."""
    encoded = tokenizer.encode("a", add_special_tokens=False)
    for one in [*encoded, *range(min(len(tokenizer), MOST_TRIED))]:
        text, twice = (str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in ([one], [one, one]))
        is_plain = text.strip() and BROKEN not in text and one not in tokenizer.all_special_ids
        if is_plain and twice.startswith(text):
            return [one], text
    return [], ""


def _is_list(kind: pa.DataType, is_item: Callable[[pa.DataType], bool]) -> bool:
    return bool(pa.types.is_list(kind) and is_item(kind.value_type))
