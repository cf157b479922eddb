"""Writes Arrow files that are there as a whole or not at all, for people and for other programs to read."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

# In the caller's thread alone: it runs beside other work.
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)


def write_arrow(
    path: Path,
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    metadata: Mapping[bytes, bytes],
    syncs: bool = False,
) -> int:
    """Write batches of one schema, with more metadata, as one compressed file; return its bytes.

    `syncs` brings them to disk before the file has its name.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial = path.with_suffix(".partial")
    schema = schema.with_metadata({**(schema.metadata or {}), **metadata})
    # Parquet takes four times as long to write so few rows.
    with partial.open("wb") as file:
        with pa.ipc.new_file(file, schema, options=_OPTIONS) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        if syncs:
            file.flush()
            os.fsync(file.fileno())
        num_bytes = file.tell()
    partial.replace(path)
    return num_bytes
