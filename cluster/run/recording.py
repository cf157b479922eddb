"""Persists all rows that a run learns from, beside the loop, so that another run can replay them."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from cluster.actors.cluster import RAY, Cluster
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import CheckpointError
from cluster.contracts.files import Record
from cluster.contracts.recorded_rows import RecordedBatch, RecordedRows
from cluster.run.checkpoints import is_due
from cluster.run.hooks import RunContext, StepHook

WAIT_SECONDS = 60.0  # the bytes are in the object store already

_log = logging.getLogger("preceptor")


class Recording(StepHook):
    """Writes each step's scored batches while the next step is under way.

    A step that a checkpoint holds is on disk before the checkpoint is, unless an alarm asks for it. A file that cannot
    be written ends the run: a record with a hole in it would be replayed as if it were whole.
    """

    def __init__(self, run: RunContext, cluster: Cluster = RAY) -> None:
        super().__init__(run)
        self._cluster = cluster
        self._files = RecordedRows(run.directory.rows)
        self._prompts = run.inputs.prompts.checksum if run.config.rollout.record else ""
        self._files.drop_from(run.first_step + 1)
        missing = run.first_step - len(self._files.files())
        if run.config.rollout.record and missing:
            _log.warning("%s: rows of %d steps before this one are not recorded", self._files.folder, missing)
        self._thread = ThreadPoolExecutor(1, "recorded-rows")
        self._writing: Future[Record] | None = None  # the step before

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Begin to write the step's batches, and return what writing those of the step before took."""
        if not self.run.config.rollout.record:
            return {}
        began = time.perf_counter()
        written = self._finish()
        self._writing = self._thread.submit(self._write, step, list(batches))
        if self.run.is_over or self.run.stop.is_set() or is_due(step, self.run.config.checkpoint.every_steps):
            written = {**written, **self._finish()}
        return {**written, "record/wait_seconds": time.perf_counter() - began} if written else {}

    def end(self, error: BaseException | None) -> None:
        """Write what is left; a checkpoint may follow."""
        self._thread.shutdown(wait=True)
        if error is None:
            self._finish()

    def _finish(self) -> Record:
        if self._writing is None:
            return {}
        written, self._writing = self._writing.result(), None
        return written

    def _write(self, step: int, handles: Sequence[BatchHandle]) -> Record:
        """Write one step's batches; return their bytes, and the processor's seconds."""
        began = time.thread_time()
        wires = self._cluster.get([handle.reference for handle in handles], WAIT_SECONDS, "rows to record")
        batches = [
            RecordedBatch(_decode(wire), dict(handle.scored_by), dict(handle.teacher_versions))
            for wire, handle in zip(wires, handles, strict=True)
        ]
        try:
            num_bytes = self._files.write(step, batches, self._prompts)
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{self._files.folder}: the rows of step {step} cannot be recorded: {error}; make place, or set "
                "rollout.record = false"
            ) from error
        return {"record/bytes": float(num_bytes), "record/write_seconds": time.thread_time() - began}


def _decode(wire: pa.Buffer) -> pa.RecordBatch:
    """Decode a batch that the learner has checked."""
    with pa.ipc.open_stream(wire) as reader:
        return reader.read_next_batch()
