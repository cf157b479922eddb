"""Passes trajectory batches from worker to worker through Ray's object store.

A worker returns two values: the batch's wire bytes, which stay in the object store of its node, and the handle, which
is all that the driver reads. The driver owns both, so a finished batch outlives the worker that made it. (A reference
that a worker makes and yields from a streaming generator does not: Ray loses its count, ray-project/ray#58080.)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Metrics
from cluster.contracts.pieces import Pieces
from cluster.contracts.trajectory import ragged, strict_tokens
from cluster.contracts.wire import wire_pieces

# Ray sends return values below 100 kB inside its reply to the caller: small batches would pass through the driver.
INLINED_BYTES = 2048
STORE_ENVIRONMENT: Mapping[str, str] = {"RAY_max_direct_call_object_size": str(INLINED_BYTES)}


def pack(batch: pa.RecordBatch, metrics: Metrics) -> tuple[Pieces, BatchHandle]:
    """Return a batch's bytes, which arrive as one `pa.Buffer`, and its handle, whose reference the driver fills in.

    The batch has at least one row, all of one teacher.
    """
    ids, episodes = (tuple(batch[name].to_pylist()) for name in ("trajectory_id", "episode_id"))
    has_failed = pc.equal(batch["finish_reason"], "environment_error").to_pylist()
    handle = BatchHandle(
        reference=None,
        teacher=batch["teacher"][0].as_py(),
        trajectory_ids=ids,
        episode_ids=() if episodes == ids else episodes,
        num_failed=len({episode for episode, failed in zip(episodes, has_failed, strict=True) if failed}),
        num_tokens=tuple(ragged(batch, "token_ids").lengths.tolist()),
        num_completion_tokens=tuple(ragged(batch, "rollout_logprobs").lengths.tolist()),
        num_loss_tokens=_num_loss_tokens(batch),
        prompt_ids=tuple(batch["prompt_id"].to_pylist()),
        rewards=tuple(batch["reward"].to_pylist()),
        min_policy_versions=tuple(batch["min_policy_version"].to_pylist()),
        max_policy_versions=tuple(batch["max_policy_version"].to_pylist()),
        metrics=metrics,
    )
    return wire_pieces(batch), handle


def _num_loss_tokens(batch: pa.RecordBatch) -> tuple[int, ...]:
    strict = strict_tokens(batch)
    if strict is None:
        return ()
    ends = ragged(batch, "rollout_logprobs").offsets
    return tuple(np.diff(np.concatenate([[0], np.cumsum(strict)])[ends]).tolist())


def add_environment(option: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Return Ray actor options with more environment variables; those that the options set already stay."""
    runtime_env = dict(option.get("runtime_env", {}))
    return {**option, "runtime_env": {**runtime_env, "env_vars": {**variables, **runtime_env.get("env_vars", {})}}}
