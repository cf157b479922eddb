"""Reads small files whole: what is no regular file, too large or not UTF-8 is one sentence instead of a hang."""

import codecs
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cluster.contracts.errors import CheckpointError, PreceptorError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text at once; readers see the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


Record = Mapping[str, float]  # one step's metrics by name
Struct = TypeVar("Struct", bound=msgspec.Struct)


class RecordsFile:
    """A file of one JSON object per line, each with the step that it belongs to, in order.

    A crash can cut the last line short; such a line does not count. Other damage is a CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        """Return the lines that were written completely."""
        return [line for line, _ in self._parsed()]

    def read(self) -> list[dict[str, Any]]:
        """Return what was written so far, without the values that were not finite."""
        return [{name: value for name, value in record.items() if value is not None} for _, record in self._parsed()]

    def decode(self, kind: type[Struct], fault: str) -> list[Struct]:
        """Return the complete lines; raise CheckpointError for one that is no `kind`, with `fault` as the reason."""
        records = []
        for number, line in enumerate(self.lines(), start=1):
            try:
                records.append(msgspec.json.decode(line, type=kind))
            except msgspec.DecodeError as error:
                raise CheckpointError(f"{self.path}:{number}: {fault}: {error}") from error
        return records

    def drop_from(self, step: int) -> None:
        """Forget `step` and what followed: a resumed run does those steps again."""
        self.keep(lambda record: record["step"] < step)

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Forget all records but those that are to be kept, and a last line that was cut short."""
        if not self.path.exists():
            return
        shortened = self.path.with_name(self.path.name + ".partial")
        with shortened.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line, record in self._parsed() if is_kept(record))
            file.flush()
            os.fsync(file.fileno())
        shortened.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> str:
        """Append one object and return its line; a value that is not finite becomes null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = json.dumps(finite)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return line

    def sync(self) -> None:
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _parsed(self) -> list[tuple[str, dict[str, Any]]]:
        *complete, _torn = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        records = []
        for number, line in enumerate(complete, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or type(record.get("step")) is not int:
                    raise ValueError("no object with a step")
                records.append((line.decode(), record))
            except ValueError as error:
                if number == len(complete):  # a crash of the whole machine can leave zeros in the place of a line
                    break
                raise CheckpointError(f"{self.path}:{number}: not a record of a step; restore the line") from error
        return records


_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def read_file(path: Path, what: str, error: type[PreceptorError]) -> bytes:
    """Return the file's bytes; `what` says what it is to the user, for example "run file".

    Raises:
        PreceptorError: of the given class, when it cannot be read, is a pipe or a device, or is marked as UTF-16.
    """
    try:
        # A pipe without a writer would be waited on for ever, and a device may never end.
        is_endless = path.is_fifo() or path.is_char_device() or path.is_block_device()
        content = b"" if is_endless else path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot read the {what}: {reason.strerror}") from reason
    except ValueError as reason:  # what Python says of a path with a NUL
        raise error(f"{str(path)!r}: cannot read the {what}: {reason}") from reason
    if is_endless:
        raise error(f"{path}: cannot read the {what}: it is not a regular file")
    if content.startswith(_MARKS):
        raise error(f"{path}: the {what} begins with a byte order mark; save it as plain UTF-8")
    return content


def read_text(path: Path, what: str, error: type[PreceptorError], most_bytes: int) -> str:
    """Return the file's text; raise an error as `read_file` does, and if it is not UTF-8 or too long."""
    content = read_file(path, what, error)
    if len(content) > most_bytes:
        raise error(f"{path}: the {what} has {len(content)} bytes; expected at most {most_bytes}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{path}: the {what} is not UTF-8 ({reason}); save it as plain UTF-8") from reason
