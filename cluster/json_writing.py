"""Files that are complete whenever somebody reads them."""

from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text at once; readers see the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
