"""The self-checks that need running engines: a few real completions through every pool, compared where they meet."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa

from cluster.actors import get
from cluster.contracts.config import Config, Divergence, TeacherConfig
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.metrics import report
from cluster.contracts.trajectory import from_wire
from cluster.pipeline import Inputs, Pipeline, start_pipeline, start_teacher, train_requests, train_sampling
from cluster.placement import Placement
from cluster.self_checks import (
    CheckResult,
    check_gradient_at_optimum,
    check_not_uniform,
    check_replicas,
    check_sampler_gap,
    check_self_kl,
)

NUM_PROMPTS = 8  # enough for a few hundred tokens; the checks look for gross disagreement
ITSELF = "student"  # the name of the teacher pool that serves the student's own weights
_DIVERGENCES: tuple[Divergence, ...] = ("sampled_reverse_kl", "reverse_kl", "forward_kl", "jsd")


def run_live_checks(config: Config, inputs: Inputs, placement: Placement) -> list[CheckResult]:
    """Start the run's pools, check them, then start a scorer of the student's own weights and check that too."""
    with start_pipeline(config, inputs, placement) as pipeline:
        pipeline.learner.publish_weights(pipeline.rollouts.actors, policy_version=0)
        requests = train_requests(config, inputs, step=0)[:NUM_PROMPTS]
        handles = list(pipeline.rollouts.generate(requests, train_sampling(config), config.evaluation.verifier))
        results = [_sampler_gap(config, pipeline, handles)]
        for name, pool in pipeline.teachers.pools.items():
            routed = [replace(handle, teacher=name) for handle in handles]
            replicas = [_read(config, scored) for scored in pool.score_everywhere(routed)]
            dtype = config.teachers[name].engine.dtype
            results += [check_replicas(name, replicas, dtype), check_not_uniform(name, replicas[0])]
        pipeline.teachers.shutdown()  # their share of the cluster goes to the scorer of the student
        return results + _against_itself(config, inputs, placement, pipeline, handles)


def _sampler_gap(config: Config, pipeline: Pipeline, handles: Sequence[BatchHandle]) -> CheckResult:
    student = np.concatenate([pipeline.learner.student_logprobs(handle) for handle in handles])
    looser = max(config.rollout.engine.dtype, config.learner.dtype, key=["float32", "float16", "bfloat16"].index)
    return check_sampler_gap(_read(config, handles), student, looser)


def _against_itself(
    config: Config, inputs: Inputs, placement: Placement, pipeline: Pipeline, handles: Sequence[BatchHandle]
) -> list[CheckResult]:
    """Score the student's completions with the student: every divergence and every gradient must be 0."""
    any_teacher = next(iter(config.teachers))
    top_k = config.teachers[any_teacher].top_k
    itself = TeacherConfig(
        config.student.model, config.student.trust_remote_code, top_k=top_k, engine=config.rollout.engine
    )
    mirrored = msgspec.structs.replace(config, teachers={ITSELF: itself})
    share = replace(placement.rollout, num_workers=1)
    pool = start_teacher(mirrored, inputs, share, ITSELF)
    try:
        pool.wait_until_ready()
        (scored,) = pool.score_everywhere([replace(handle, teacher=ITSELF) for handle in handles])
        results = [check_self_kl(_read(config, scored), config.rollout.engine.dtype)]
        for divergence in _DIVERGENCES:
            found = report(pipeline.learner.measure_gradient(scored, divergence))
            results.append(check_gradient_at_optimum(divergence, found["gradient_norm"], config.learner.dtype))
        return results
    finally:
        pool.shutdown()


def _read(config: Config, handles: Sequence[BatchHandle]) -> pa.RecordBatch:
    """Fetch batches and join them in the order given."""
    timeout_seconds = config.ray.call_timeout_seconds
    batches = [from_wire(get(handle.reference, timeout_seconds, "a checked batch")) for handle in handles]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
