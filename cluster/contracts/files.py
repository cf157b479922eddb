"""Reads small files whole: what is no regular file, too large or not UTF-8 is one sentence instead of a hang."""

import codecs
from pathlib import Path

from cluster.contracts.errors import PreceptorError

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def read_file(path: Path, what: str, error: type[PreceptorError]) -> bytes:
    """Return the file's bytes, which begin with no byte order mark.

    Args:
        path: where it is.
        what: what it is to the user, for example "run file".
        error: the class to raise.

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
    """Return the file's text.

    Raises:
        PreceptorError: of the given class, also when the file is not UTF-8 or longer than `most_bytes`.
    """
    content = read_file(path, what, error)
    if len(content) > most_bytes:
        raise error(f"{path}: the {what} has {len(content)} bytes; expected at most {most_bytes}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{path}: the {what} is not UTF-8 ({reason}); save it as plain UTF-8") from reason
