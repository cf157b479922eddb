"""Finds out, before any training, whether student, teachers and engines give a token the same probability.

A few real completions go through every pool, and the results are compared where they meet; `preceptor check` runs this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pyarrow as pa

from cluster.actors.cluster import RAY
from cluster.config.fields import WeightSchedule
from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.config.stages import Dtype, TeacherConfig
from cluster.config.terms import TEACHER, PolicyGradientTerm, RepresentationTerm
from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Floats, ragged, strict_tokens
from cluster.contracts.wire import from_wire
from cluster.placement.placement import Placement
from cluster.run.inputs import Inputs, train_requests, train_sampling
from cluster.run.pools import Pipeline, start_pipeline, start_student_as_teacher
from rollout_workers.contexts.builder import plain_contexts
from teacher_workers.audit.checks import AGREEMENT_NATS, hidden_tolerance
from teacher_workers.router import TeacherRouter

NUM_PROMPTS = 8  # enough for a few hundred tokens; the checks notice gross disagreement
ITSELF = "student"  # the name of the teacher pool that serves the student's own weights
SELF_KL_NATS: Mapping[Dtype, float] = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-2}
ROUNDING_NATS: Mapping[Dtype, float] = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-11}  # near 1 nat
ROUNDING_FACTOR = 4.0  # gradients of tiny models lay up to 2.3 times as high as their rounding errors explain
UNIFORM_NATS = 1e-3  # spread below which scores say nothing about their tokens


@dataclass(frozen=True)
class CheckResult:
    """Says what one check measured, and whether that is good."""

    name: str
    measured: str
    passed: bool | None  # None: it was not made
    advice: str  # what to do when it did not pass

    def describe(self) -> str:
        """Return its line for the user.

        Example:
            >>> CheckResult("gap", "0.2 nats", passed=False, advice="compare dtypes").describe()
            'FAIL  gap: 0.2 nats - compare dtypes'
        """
        mark = {True: "ok  ", False: "FAIL", None: "skip"}[self.passed]
        return f"{mark}  {self.name}: {self.measured}{'' if self.passed else f' - {self.advice}'}"


NO_GPU = CheckResult(
    "student scored as its own teacher",
    "not checked, for the teacher's workers have no GPU that would serve it",
    None,
    "check a run file whose teacher has a GPU, once",
)


def run_live_checks(config: Config, inputs: Inputs, placement: Placement) -> list[CheckResult]:
    """Start the run's pools, check them, then start a scorer of the student's own weights and check that too."""
    config, inputs = sample_plainly(config), replace(inputs, contexts=plain_contexts(inputs.contexts))
    # The learner takes no part in scoring, so it can be the one of the mirrored run.
    mirrored = mirror(config)
    with start_pipeline(config, inputs, placement, learner_config=mirrored) as pipeline:
        pipeline.learner.publish_weights(pipeline.rollouts.actors, policy_version=0)
        requests = train_requests(config, inputs, step=0)[:NUM_PROMPTS]
        handles = list(pipeline.rollouts.generate(requests, train_sampling(config)))
        student = np.concatenate([pipeline.learner.student_logprobs(handle) for handle in handles])
        results = [check_sampler_gap(_read(config, handles), student, looser_dtype(config))]
        for name, pool in pipeline.teachers.pools.items():
            request = ScoreRequest(TEACHER, aligned=config.teachers[name].is_aligned)
            replicas = [_read(config, scored) for scored in pool.score_everywhere(handles, request)]
            dtype = config.teachers[name].engine.dtype
            results += [check_replicas(name, replicas, dtype), check_not_uniform(name, replicas[0])]
        if placement.on_gpu and not placement.teachers[mirrored.routes[0]].gpus_per_worker:
            return [*results, NO_GPU]
        pipeline.teachers.shutdown()  # their share of the cluster goes to the scorer of the student
        if any(teacher.is_aligned for teacher in config.teachers.values()):  # the student reads its own tokens alone
            pipeline.rollouts.set_prompts(inputs.prompts.without_teachers_tokens())
            handles = list(pipeline.rollouts.generate(requests, train_sampling(config)))
        return results + _against_itself(mirrored, inputs, placement, pipeline, handles)


def sample_plainly(config: Config) -> Config:
    """Return the run with all tokens sampled at temperature 1: so they have the log-probabilities of the model."""
    plain = msgspec.structs.replace(config.rollout, temperature=1.0, top_p=1.0, top_k=0)
    return msgspec.structs.replace(config, rollout=plain)


def mirror(config: Config) -> Config:
    """Return the run with the student's own weights for every teacher, served as the rollout workers serve them.

    A projection bank, which maps two other models, is left out with its terms.
    """
    student = config.student
    compared = {name: term for name, term in config.objective.terms.items() if getattr(term, "bank", None) is None}
    teachers = {
        name: TeacherConfig(
            student.model,
            trust_remote_code=student.trust_remote_code,
            base=teacher.base,
            stop_class=config.rollout.stop_class or (),
            states=None if teacher.states is None or teacher.states.bank is not None else teacher.states,
            # On a shared GPU it takes the teacher's place.
            engine=msgspec.structs.replace(
                config.rollout.engine,
                gpu_memory_fraction=teacher.engine.gpu_memory_fraction,
                kv_cache_gib=(config.ray.share_gpu and teacher.engine.kv_cache_gib)
                or config.rollout.engine.kv_cache_gib,
                sleep=False,
            ),
        )
        for name, teacher in config.teachers.items()
    }
    objective = msgspec.structs.replace(config.objective, terms=compared)
    return msgspec.structs.replace(config, teachers=teachers, objective=objective)


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
        itself = TeacherRouter({ITSELF: pool}, mirrored.ray.call_timeout_seconds)
        scored = list(
            itself.score(handles, lambda route: [(ITSELF, request) for _, request in mirrored.scorers(route)])
        )
        results = [check_self_kl(_read(mirrored, scored), mirrored.rollout.engine.dtype)]
        results += gradient_checks(
            mirrored.objective,
            lambda objective: report(pipeline.learner.measure_gradient(ReadyBatches(scored), objective)),
            float(np.abs(ragged(_read(mirrored, scored), "teacher_logprobs").values).mean()),
            looser_dtype(mirrored),
        )
        return results
    finally:
        pool.shutdown()


def _read(config: Config, handles: Sequence[BatchHandle]) -> pa.RecordBatch:
    timeout_seconds = config.ray.call_timeout_seconds
    batches = [from_wire(RAY.get(handle.reference, timeout_seconds, "a checked batch")) for handle in handles]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _teacher_logprobs(scored: pa.RecordBatch) -> Floats:
    """Return the scores of all tokens that the teacher has scored."""
    logprobs, strict = ragged(scored, "teacher_logprobs").values, strict_tokens(scored)
    return logprobs if strict is None else logprobs[strict]


def check_replicas(name: str, replicas: Sequence[pa.RecordBatch], dtype: Dtype) -> CheckResult:
    """Compare the scores that each replica of one teacher gave to the same trajectories."""
    first = _teacher_logprobs(replicas[0])
    gap = max((float(np.abs(_teacher_logprobs(other) - first).mean()) for other in replicas[1:]), default=0.0)
    return CheckResult(
        f"teacher {name}: replicas agree",
        f"{gap:.2e} nats between {len(replicas)} replica(s)",
        gap <= AGREEMENT_NATS[dtype],
        "a replica serves another checkpoint or precision; restart the pool",
    )


def check_not_uniform(name: str, scored: pa.RecordBatch) -> CheckResult:
    """Notice a teacher that gives every token the same probability, as one with unloaded weights does."""
    spread = float(_teacher_logprobs(scored).std())
    return CheckResult(
        f"teacher {name}: scores are not uniform",
        f"standard deviation {spread:.3f} nats",
        spread > UNIFORM_NATS,
        "its weights were not loaded; check the model directory",
    )


def check_sampler_gap(generated: pa.RecordBatch, student_logprobs: Floats, dtype: Dtype) -> CheckResult:
    """Compare the log-probabilities that the rollout engine reported with the learner's own forward pass."""
    gap = float(np.abs(ragged(generated, "rollout_logprobs").values - student_logprobs).mean())
    return CheckResult(
        "rollout engine and learner agree",
        f"{gap:.2e} nats per token",
        gap <= AGREEMENT_NATS[dtype],
        "compare rollout.engine.dtype and learner.dtype",
    )


def check_self_kl(scored_by_itself: pa.RecordBatch, dtype: Dtype) -> CheckResult:
    """Measure KL(student || student) through the whole pipeline; a shift of one token shows as several nats."""
    sampled = ragged(scored_by_itself, "rollout_logprobs").values
    log_ratio = sampled - ragged(scored_by_itself, "teacher_logprobs").values
    kl, spread = float(log_ratio.mean()), float(np.abs(log_ratio).mean())
    return CheckResult(
        "student scored as its own teacher",
        f"KL {kl:.2e} and mean absolute log-ratio {spread:.2e} nats per token",
        abs(kl) <= SELF_KL_NATS[dtype] and spread <= AGREEMENT_NATS[dtype],
        "generation and scoring disagree on alignment or chat template",
    )


def gradient_checks(
    objective: ObjectiveConfig,
    measure: Callable[[ObjectiveConfig], Mapping[str, float]],
    logprob_nats: float,
    dtype: Dtype,
) -> list[CheckResult]:
    """Check every term that vanishes where student and teacher are the same model.

    Args:
        objective: the run's.
        measure: returns the metrics of a gradient on completions that the student has scored as the teacher.
        logprob_nats: mean absolute log-probability of their tokens.
        dtype: the looser one of engine and learner.
    """
    results = []
    for name, term in objective.terms.items():
        if not term.is_zero_at_the_student:
            continue
        if isinstance(term, RepresentationTerm):
            measured = measure(msgspec.structs.replace(objective, terms={name: term}))
            results.append(check_states_at_optimum(name, measured["state_error"], dtype))
            continue
        # Advantages that are the tokens' log-probabilities, in place of the log-ratios that should be 0.
        discount = term.discount if isinstance(term, PolicyGradientTerm) else 0.0
        weight = term.weight.largest if isinstance(term.weight, WeightSchedule) else term.weight
        checked = msgspec.structs.replace(term, weight=weight)
        known = PolicyGradientTerm(weight=weight, student="none", discount=discount)
        at_optimum, scale = (measure(msgspec.structs.replace(objective, terms={name: one})) for one in (checked, known))
        noise = min(max(at_optimum["sampler_learner_gap"], ROUNDING_NATS[dtype]), AGREEMENT_NATS[dtype])
        rounding = noise * sum(map(abs, term.target.values()))
        per_nat = scale["gradient_norm"] / logprob_nats if logprob_nats else 0.0
        results.append(check_gradient_at_optimum(name, at_optimum["gradient_norm"], rounding * per_nat))
    return results


def check_states_at_optimum(term: str, error: float, dtype: Dtype) -> CheckResult:
    """Check that the learner's hidden states are the engine's, but for rounding, which grows from layer to layer.

    `error` is the mean distance over the length; rows that are shifted by one are about as far apart as they are long.
    """
    return CheckResult(
        f"term '{term}' at student = teacher",
        f"hidden states {error:.2e} of their length apart",
        error <= hidden_tolerance(AGREEMENT_NATS[dtype]),
        "the learner and the scoring engine compute different hidden states; compare their dtypes, and the check above",
    )


def check_gradient_at_optimum(term: str, gradient_norm: float, rounding_norm: float) -> CheckResult:
    """Check that the gradient is 0, but for rounding, at student = teacher; any other drives them apart.

    There it is 1/N sum r_t s_t over the N tokens, with the score s_t = d log p(y_t) / d weights and the log-ratio r_t,
    which is rounding alone. Rounding of e nats has a norm of about

        rounding_norm = e |1/N sum a_t s_t| / mean |a_t|     with known advantages a_t = log p(y_t),

    whatever the model's size, its logits' scale and N. e is what the rollout engine and the learner differ by on the
    same tokens, between the dtype's step and what may be: what is wrong with the scores does not raise the limit.
    """
    limit = ROUNDING_FACTOR * rounding_norm
    return CheckResult(
        f"term '{term}' at student = teacher",
        f"gradient norm {gradient_norm:.2e}, of which rounding explains {limit:.2e}",
        gradient_norm <= limit,
        "the learner and the scoring engine compute different probabilities; compare their dtypes, and the check above",
    )


def looser_dtype(config: Config) -> Dtype:
    """Return the dtype of rollout engine and learner that rounds more."""
    return max(config.rollout.engine.dtype, config.learner.dtype, key=["float32", "float16", "bfloat16"].index)
