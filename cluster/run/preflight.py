"""The self-checks that need running engines: a few real completions through every pool, compared where they meet."""

import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa

from cluster.actors.cluster import RAY
from cluster.config.objective import (
    TEACHER,
    AnyTerm,
    DivergenceTerm,
    ObjectiveConfig,
    PolicyGradientTerm,
    TaskRewardTerm,
)
from cluster.config.run_config import Config
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.wire import from_wire
from cluster.placement.placement import Placement
from cluster.run.inputs import Inputs, train_requests, train_sampling
from cluster.run.pools import Pipeline, start_pipeline, start_student_as_teacher
from cluster.run.self_checks import (
    CheckResult,
    check_gradient_at_optimum,
    check_not_uniform,
    check_replicas,
    check_sampler_gap,
    check_self_kl,
)
from teacher_workers.router import TeacherPools

NUM_PROMPTS = 8  # enough for a few hundred tokens; the checks look for gross disagreement
ITSELF = "student"  # the name of the teacher pool that serves the student's own weights


def run_live_checks(config: Config, inputs: Inputs, placement: Placement) -> list[CheckResult]:
    """Start the run's pools, check them, then start a scorer of the student's own weights and check that too."""
    # The learner takes no part in what is asked of the teachers, so it can be the one of the mirrored run.
    mirrored = mirror(config)
    with start_pipeline(config, inputs, placement, learner_config=mirrored) as pipeline:
        pipeline.learner.publish_weights(pipeline.rollouts.actors, policy_version=0)
        requests = train_requests(config, inputs, step=0)[:NUM_PROMPTS]
        handles = list(pipeline.rollouts.generate(requests, train_sampling(config)))
        results = [_sampler_gap(config, pipeline, handles)]
        for name, pool in pipeline.teachers.pools.items():
            replicas = [_read(config, scored) for scored in pool.score_everywhere(handles, ScoreRequest(TEACHER))]
            dtype = config.teachers[name].engine.dtype
            results += [check_replicas(name, replicas, dtype), check_not_uniform(name, replicas[0])]
        pipeline.teachers.shutdown()  # their share of the cluster goes to the scorer of the student
        return results + _against_itself(mirrored, inputs, placement, pipeline, handles)


def mirror(config: Config) -> Config:
    """Return the run with the student's own weights for every teacher, served as the rollout workers serve them."""
    student = config.student
    teachers = {
        name: TeacherConfig(
            student.model,
            student.trust_remote_code,
            base=teacher.base,
            # On a shared GPU it takes the teacher's place.
            engine=msgspec.structs.replace(
                config.rollout.engine, gpu_memory_fraction=teacher.engine.gpu_memory_fraction, sleep=False
            ),
        )
        for name, teacher in config.teachers.items()
    }
    return msgspec.structs.replace(config, teachers=teachers)


def terms_with_optimum_at_the_student(objective: ObjectiveConfig) -> dict[str, AnyTerm]:
    """Return the terms whose gradient is 0 when every model of their target is the student."""
    return {
        name: term
        for name, term in objective.terms.items()
        if not isinstance(term, TaskRewardTerm) and math.isclose(sum(term.target.values()), _student_share(term))
    }


def _student_share(term: PolicyGradientTerm | DivergenceTerm) -> float:
    return 0.0 if isinstance(term, PolicyGradientTerm) and term.student == "none" else 1.0


def _sampler_gap(config: Config, pipeline: Pipeline, handles: Sequence[BatchHandle]) -> CheckResult:
    student = np.concatenate([pipeline.learner.student_logprobs(handle) for handle in handles])
    looser = max(config.rollout.engine.dtype, config.learner.dtype, key=["float32", "float16", "bfloat16"].index)
    return check_sampler_gap(_read(config, handles), student, looser)


def _against_itself(
    mirrored: Config, inputs: Inputs, placement: Placement, pipeline: Pipeline, handles: Sequence[BatchHandle]
) -> list[CheckResult]:
    """Score the student's completions with the student: the divergence and every gradient must be 0."""
    name = mirrored.routes[0]
    share = replace(placement.rollout, num_workers=1)
    if placement.on_gpu and placement.learner.gpus_per_worker < 1:
        share = replace(share, gpus_per_worker=placement.teachers[name].gpus_per_worker)
    pool = start_student_as_teacher(mirrored, inputs, share, name)
    try:
        pool.wait_until_ready()
        itself = TeacherPools({ITSELF: pool}, mirrored.ray.call_timeout_seconds)
        scored = list(
            itself.score(handles, lambda route: [(ITSELF, request) for _, request in mirrored.scorers(route)])
        )
        results = [check_self_kl(_read(mirrored, scored), mirrored.rollout.engine.dtype)]
        for term_name, term in terms_with_optimum_at_the_student(mirrored.objective).items():
            objective = msgspec.structs.replace(mirrored.objective, terms={term_name: term})
            found = report(pipeline.learner.measure_gradient(ReadyBatches(scored), objective))
            results.append(check_gradient_at_optimum(term_name, found["gradient_norm"], mirrored.learner.dtype))
        return results
    finally:
        pool.shutdown()


def _read(config: Config, handles: Sequence[BatchHandle]) -> pa.RecordBatch:
    """Fetch batches and join them in the order given."""
    timeout_seconds = config.ray.call_timeout_seconds
    batches = [from_wire(RAY.get(handle.reference, timeout_seconds, "a checked batch")) for handle in handles]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
