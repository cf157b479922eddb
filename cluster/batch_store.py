"""Trajectory batches in Ray's object store: the worker that makes a batch puts it, the worker that needs it gets it."""

import pyarrow as pa
import ray

from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.metrics import Metrics
from cluster.contracts.trajectory import ragged, to_wire


def put_batch(batch: pa.RecordBatch, metrics: Metrics) -> BatchHandle:
    """Store a batch with at least one row, all of one teacher, and return what the driver may know of it.

    A worker returns this handle, and not the bytes: Ray sends a small return value inside its reply to the caller, so
    the bytes would pass through the driver. What `ray.put` stores stays on this node until another worker fetches it.
    """
    return BatchHandle(
        reference=ray.put(to_wire(batch)),
        teacher=batch["teacher"][0].as_py(),
        trajectory_ids=tuple(batch["trajectory_id"].to_pylist()),
        num_tokens=tuple(ragged(batch, "token_ids").lengths.tolist()),
        num_completion_tokens=tuple(ragged(batch, "rollout_logprobs").lengths.tolist()),
        metrics=metrics,
    )
