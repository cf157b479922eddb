"""Reads the rows of prompts: JSON lines, JSON, Parquet, CSV, a folder, a data set of the hub, a package's tasks."""

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from cluster.config.data_source import DataSource, parse_source
from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import PromptError
from cluster.contracts.files import read_file
from rollout_workers.harness.process import VERIFIERS, list_tasks
from rollout_workers.reasoning_gym_tasks import read_tasks

Row = dict[str, Any]

TASKS = f"{VERIFIERS}:tasks"
HUB_SECONDS = 5.0  # that the hub has to answer at all
MAX_LINE_BYTES = 1 << 24  # more text than any context holds; tokenising it would only take long
GZIP = b"\x1f\x8b"  # at the beginning of a file
TRAIN_SPLITS, HELD_OUT_SPLITS = ("train",), ("test", "validation")  # of a data set, the first that it has
# Names of the columns that hold prompts and answers in public data sets, the likeliest first.
PROMPT_COLUMNS = ("prompt", "messages", "conversations", "question", "problem", "instruction", "input", "query")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")


def read_rows(
    source: str, splits: Sequence[str] = TRAIN_SPLITS, environment: EnvironmentConfig | None = None
) -> Iterator[tuple[str, Row | PromptError]]:
    """Yield where each row stands, and the row, or what is wrong with it.

    `environment` says in which Python the package `verifiers` is, and with which arguments.

    Raises:
        PromptError: the source is missing, empty or no data that we know.
    """
    parsed = parse_source(source)
    if parsed.kind == "file" and parsed.split is not None:
        raise PromptError(f"{source}: a file has no splits; name {parsed.place} alone")
    num_rows = 0
    for row in _rows_of(parsed, source, splits, environment or EnvironmentConfig()):
        num_rows += 1
        yield row
    if not num_rows:
        raise PromptError(f"{source}: the {'file' if parsed.kind == 'file' else 'data set'} holds no prompt")


def _rows_of(
    parsed: DataSource, source: str, splits: Sequence[str], environment: EnvironmentConfig
) -> Iterator[tuple[str, Row | PromptError]]:
    if parsed.kind == "file":
        return _file_rows(parsed.place)
    if parsed.kind == "reasoning-gym":
        return read_tasks(parsed.place)
    if parsed.kind == "verifiers":
        return _tasks_of_verifiers(source, parsed.place, environment)
    return _table_rows(source, _dataset(parsed, splits))


def _tasks_of_verifiers(
    source: str, task: str, environment: EnvironmentConfig
) -> Iterator[tuple[str, Row | PromptError]]:
    try:
        rows = list_tasks(TASKS, {"task": task, "arguments": environment.arguments}, environment.python)
    except PromptError as error:
        raise PromptError(f"{source}: {error}") from error
    yield from ((_row(source, number), row) for number, row in enumerate(rows, start=1))


def guess_columns(row: Row) -> dict[str, str]:
    """Return which columns of a row the prompt and the answer are likely to be in, as `prompts.columns` names them.

    Example:
        >>> guess_columns({"question": "2 + 2?", "reward_model": {"ground_truth": "4"}})
        {'prompt': 'question', 'answer': 'reward_model.ground_truth'}
    """
    guesses = {"prompt": PROMPT_COLUMNS, "answer": ANSWER_COLUMNS}
    named = {field: [name for name in names if value_at(row, name) is not None] for field, names in guesses.items()}
    return {field: names[0] for field, names in named.items() if names}


def value_at(row: Row, path: str) -> Any:
    """Return a column's value, or the one inside it that a dotted path leads to; None where there is none.

    Example:
        >>> value_at({"answers": {"text": ["4", "four"]}}, "answers.text.0")
        '4'
    """
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _file_rows(place: str) -> Iterator[tuple[str, Row | PromptError]]:
    path = Path(place)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table_rows(place, _read_csv(path))
    content = read_file(path, "prompt file", PromptError)
    if content.startswith(b"PAR1"):
        return _table_rows(place, _read_parquet(path))
    if content.startswith(GZIP):
        content = _unpacked(path, content)
    if content.lstrip().startswith(b"["):
        return _json_rows(path, content)
    if ".txt" in path.suffixes and not content.lstrip().startswith(b"{"):
        return _text_lines(path, content)
    return _json_lines(path, content)


def _unpacked(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(f"{path}: cannot unpack the prompt file: {error}") from error


def _text_lines(path: Path, content: bytes) -> Iterator[tuple[str, Row | PromptError]]:
    """Yield a prompt per line that is not empty."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            if text := line.decode().strip():
                yield f"{path}:{number}", {"prompt": text}
        except UnicodeDecodeError as error:
            yield f"{path}:{number}", PromptError(f"not UTF-8: {error}")


def _json_lines(path: Path, content: bytes) -> Iterator[tuple[str, Row | PromptError]]:
    decoder = msgspec.json.Decoder(Row)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            yield (
                f"{path}:{number}",
                PromptError(f"the line has {len(line)} bytes; expected one JSON object of up to {MAX_LINE_BYTES}"),
            )
            continue
        try:
            yield f"{path}:{number}", decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield f"{path}:{number}", PromptError(f"not a prompt object: {error}")


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[str, Row | PromptError]]:
    try:
        rows = msgspec.json.decode(content, type=list[Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PromptError(f"{path}: not a JSON array of prompt objects: {error}") from error
    for number, row in enumerate(rows, start=1):
        try:
            yield _row(path, number), msgspec.convert(row, Row)
        except msgspec.ValidationError as error:
            yield _row(path, number), PromptError(f"not a prompt object: {error}")


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path}: cannot read the Parquet file: {error}") from error


def _read_csv(path: Path) -> pa.Table:
    """Read every column as text: `007` and `4.0` are answers as they stand. An empty field is null."""
    import pyarrow.csv as pc

    read_file(path, "prompt file", PromptError)  # its errors are ours
    parse = pc.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True)
    try:
        with pc.open_csv(path, parse_options=parse) as reader:
            names = reader.schema.names
        texts = dict.fromkeys(names, pa.string())
        convert = pc.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
        return pc.read_csv(path, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{path}: cannot read the CSV file: {error}") from error


def _table_rows(source: str | Path, table: pa.Table) -> Iterator[tuple[str, Row | PromptError]]:
    """Yield a table's rows without columns that hold bytes, such as images.

    Inside a column, null is what a row does not have: a table gives all its messages and tools the same keys.
    """
    texts = [name for name, type_ in zip(table.schema.names, table.schema.types, strict=True) if not _has_bytes(type_)]
    number = 0
    for batch in table.select(texts).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            number += 1
            yield _row(source, number), {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _has_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return True
    return any(_has_bytes(type_.field(index).type) for index in range(type_.num_fields))


def _row(source: str | Path, number: int) -> str:
    return f"{source}: row {number}"


def _dataset(source: DataSource, splits: Sequence[str]) -> pa.Table:
    """Load a folder or a data set of the hub, through its cache."""
    import datasets

    saved = [Path(source.place) / name for name in ("state.json", "dataset_dict.json")]  # by `save_to_disk`
    try:
        if source.kind == "folder" and any(file.exists() for file in saved):
            loaded = datasets.load_from_disk(source.place)
        else:
            with hub_or_cache(source):
                loaded = datasets.load_dataset(source.place, source.subset, split=source.split)
        return _split_of(source, loaded, splits).with_format("arrow")[:]
    except ConnectionError as error:
        raise PromptError(
            f"{source.place}: there is no such file or folder, and the Hugging Face hub cannot be reached: {error}; "
            f"where it can, `hf download {source.place} --repo-type dataset --local-dir FOLDER` gives a folder to name"
        ) from error
    except (pa.ArrowException, OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PromptError(
            f"{source.place}: cannot load the data set: {error}; "
            f"subset and split are written {source.place}/SUBSET:SPLIT"
        ) from error


@contextmanager
def hub_or_cache(source: DataSource) -> Iterator[None]:
    """Look into the cache alone while the context lasts, if the hub has the data set and cannot be reached.

    `datasets` would try for half a minute first.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    before = constants.HF_HUB_OFFLINE
    if source.kind == "hub" and not before:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except HTTPError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _split_of(source: DataSource, loaded: Any, splits: Sequence[str]) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    names = list(loaded)
    wanted = [source.split] if source.split is not None else [*splits, *(names if len(names) == 1 else [])]
    split = next((name for name in wanted if name in loaded), None)
    if split is None:
        raise ValueError(f"it has the splits {', '.join(names)}; name one, as in {source.place}:{names[0]}")
    return loaded[split]
