"""Reads the prompts of a run, and makes the requests of each step from them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from cluster.config.pass_through import check_pass_through
from cluster.config.replay import replayed_prompts
from cluster.config.run_config import Config
from cluster.config.stages import ROLLOUT_ENGINES
from cluster.config.terms import TEACHER, TaskRewardTerm
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ConfigError
from cluster.contracts.requests import PRIVILEGED_IDS, RolloutRequest, SamplingSettings
from cluster.models.aligned_states import states_to_send
from cluster.models.model_checks import read_model
from cluster.models.pairs import Pairs, compare_all
from rollout_workers.contexts.builder import ContextSettings
from rollout_workers.contexts.plan import plan_contexts
from rollout_workers.environments.base import environment_named
from rollout_workers.environments.tool_calls import tool_schemas
from rollout_workers.environments.verifier_process import check_rewards
from rollout_workers.load_prompts import load_prompts
from rollout_workers.privileged import PrivilegedPlan, plan_privileged
from rollout_workers.prompt_sources import HELD_OUT_SPLITS, TRAIN_SPLITS
from rollout_workers.prompts import PromptOrder, PromptSet, sampling_seed
from teacher_workers.backends.base import check_signals, check_teacher

if TYPE_CHECKING:
    from cluster.run.replay import Replay

_TRAIN, _HELD_OUT, _PRIVILEGED = 0, 1, 2  # keep the seeds of training, evaluation and the privileged sampler apart


@dataclass(frozen=True)
class Inputs:
    """Holds the prompts of a run: training prompts first, held-out ones after them, under one numbering."""

    prompts: PromptSet
    train: PromptOrder
    held_out_ids: tuple[int, ...]
    max_model_len: int  # longest prompt + observations + completion + 1: the context that every engine must offer
    pairs: Pairs = field(default_factory=Pairs)  # how the teachers differ from the student
    notes: tuple[str, ...] = ()  # what the settings did to the prompts
    read_at: datetime = field(default_factory=datetime.now)  # what chat templates took for the time
    # By [teachers.NAME], of those that read other prompts than the student: the tokens of their longest one.
    scorer_prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    contexts: ContextSettings | None = None  # what builds these prompts; None: no teacher has a context
    privileged: PrivilegedPlan = field(default_factory=PrivilegedPlan)
    replay: "Replay | None" = None  # rows of another run in the place of sampled ones; None: all are sampled

    def has_own_prompts(self, route: str) -> bool:
        """Return whether the teacher of a route reads contexts that follow from the prompts alone."""
        scorers = () if self.contexts is None else self.contexts.scorers
        return any((one.route, one.model) == (route, TEACHER) and not one.template.reads_attempts for one in scorers)

    def scoring_model_len(self, *teachers: str) -> int:
        """Return the context that the engines of these teachers must offer."""
        longest = max((self.scorer_prompt_tokens.get(name, 0) for name in teachers), default=0)
        return self.max_model_len + max(0, longest - self.prompts.longest_tokens)

    def rollout_model_len(self, config: Config) -> int:
        """Return the context that the rollout engines must offer.

        The student as privileged sampler reads longer prompts, and so do teachers that score in these engines.
        """
        longest = self.privileged.prompt_tokens if config.sampling_teacher is None else 0
        own = self.max_model_len + max(0, longest - self.prompts.longest_tokens)
        scoring = (name for name, one in config.teachers.items() if one.backend == ROLLOUT_ENGINES)
        return max(own, self.scoring_model_len(*scoring))


def load_inputs(config: Config, now: datetime | None = None) -> Inputs:
    """Read models' configurations, tokenizers and prompts, and check that they fit each other.

    `now` is what chat templates take for the time; without it, it is now.
    """
    check_pass_through(config)
    student = read_model(config.student, is_student=True)
    check_signals(config)
    teachers = {name: check_teacher(name, teacher, student) for name, teacher in config.teachers.items()}
    pairs = replace(compare_all(config, student, teachers), states=states_to_send(config, student, teachers))
    models = [student, *teachers.values()]
    check_support(config, min(model.vocabulary for model in models) - len(pairs.stop_class[1:]))
    environment_named(config.environment.kind)  # refuses a wrong name before anything starts
    check_rewards(config.environment.weights)
    tool_schemas(config.environment.tools)
    context = min(model.context_tokens for model in models)
    now = now or datetime.now()
    notes = _idle_terms(config)
    own_tokenizers = {name: facts.tokenizer for name, facts in teachers.items() if config.teachers[name].is_aligned}

    def load(source: str, splits: Sequence[str]) -> PromptSet:
        return load_prompts(source, student.tokenizer, config, context, splits, notes.append, now, own_tokenizers)

    train, prompts = _train_and_all(config, load, notes)
    capacities = {name: facts.context_tokens for name, facts in teachers.items()}
    plan = plan_contexts(config, prompts, student.tokenizer, capacities, now)
    capacity = capacities.get(config.sampling_teacher or "", student.context_tokens)
    privileged = plan_privileged(config, prompts, len(train), student.tokenizer, capacity, now)
    replay = None if config.rollout.replay is None else _open_replay(config, prompts, notes)
    return Inputs(
        prompts=prompts,
        train=PromptOrder(len(train), config.run.seed, config.prompts.shuffle),
        held_out_ids=tuple(range(len(train), len(prompts)))[: config.evaluation.num_prompts or None],
        max_model_len=prompts.longest_tokens
        + config.environment.max_observation_tokens
        + config.rollout.max_completion_tokens
        + 1,
        pairs=pairs,
        notes=(*notes, *plan.notes, *privileged.notes),
        read_at=now,
        scorer_prompt_tokens={
            **_with_writer(plan.prompt_tokens, config.sampling_teacher, privileged),
            **{name: _aligned_tokens(config, prompts, name, capacities[name]) for name in own_tokenizers},
        },
        contexts=plan.settings,
        privileged=privileged,
        replay=replay,
    )


def _with_writer(prompt_tokens: Mapping[str, int], writer: str | None, plan: PrivilegedPlan) -> Mapping[str, int]:
    """Return the tokens of each teacher's longest prompt, with those that one reads to write for the student."""
    if writer is None:
        return prompt_tokens
    return {**prompt_tokens, writer: max(plan.prompt_tokens, prompt_tokens.get(writer, 0))}


def _idle_terms(config: Config) -> list[str]:
    """Name the terms that would teach nothing, without being wrong."""
    rewarded = [name for name, term in config.objective.terms.items() if isinstance(term, TaskRewardTerm)]
    return [
        f"warning: objective.terms.{name} compares the samples of a prompt, and teaches nothing with "
        "rollout.samples_per_prompt = 1"
        for name in (rewarded if config.rollout.samples_per_prompt == 1 else ())
    ]


def _train_and_all(
    config: Config, load: Callable[[str, Sequence[str]], PromptSet], notes: list[str]
) -> tuple[PromptSet, PromptSet]:
    """Return the training prompts, and those with the held-out ones behind them."""
    train = load(config.prompts.train, TRAIN_SPLITS)
    if config.prompts.held_out is None:
        if config.evaluation.every_steps:
            notes.append("evaluation.every_steps is set, but nothing is evaluated: prompts.held_out names no prompts")
        return train, train
    held_out = load(config.prompts.held_out, HELD_OUT_SPLITS)
    if shared := held_out.num_shared(train):
        notes.append(f"warning: {shared:,} of the {len(held_out):,} held-out prompts are training prompts too")
    return train, PromptSet.join([train, held_out])


def _aligned_tokens(config: Config, prompts: PromptSet, name: str, capacity: int) -> int:
    """Return the longest prompt of an aligned teacher, with room for completions of up to twice as many tokens.

    What is longer still is cut, and not learned from.
    """
    completion = config.rollout.max_completion_tokens
    return min(prompts.longest_of(name) + completion, capacity - completion - 1)


def _open_replay(config: Config, prompts: PromptSet, notes: list[str]) -> "Replay":
    """Open the record that the run replays, whose prompts must be these."""
    from cluster.run.replay import Replay

    replay = Replay(config)
    replay.check_prompts(prompts.checksum)
    notes.append(f"replays {replay.num_rows:,} rows of {len(replay.units):,} prompts from {replay.directory.path}")
    return replay


def check_support(config: Config, vocabulary: int) -> None:
    """Raise ConfigError if models with so many tokens lack the candidates that the objective compares."""
    if config.objective.needs.num_candidates > vocabulary:
        raise ConfigError(
            f"objective.support_size = {config.objective.support_size} is more than the {vocabulary} tokens of the "
            "models' vocabulary; lower it"
        )


def train_requests(config: Config, inputs: Inputs, step: int) -> list[RolloutRequest]:
    """Return the requests to sample in one step, from 0: the same ones whenever the step is done again."""
    return step_requests(config, inputs.train, step)


def step_requests(config: Config, order: PromptOrder, step: int) -> list[RolloutRequest]:
    """Return the requests of one step of a run whose training prompts come in this order, without replayed rows."""
    count = config.prompts.prompts_per_step - replayed_prompts(config)
    first = step * config.prompts.prompts_per_step
    samples = config.rollout.samples_per_prompt
    return _requests(order.take(step * count, count), first, samples, (config.run.seed, _TRAIN, step))


def replayed_requests(inputs: Inputs, step: int) -> list[RolloutRequest]:
    """Return what stands for the rows that a step, from 0, replays; none where all are sampled."""
    return [] if inputs.replay is None else inputs.replay.requests(step)


def replayed_batches(inputs: Inputs, step: int) -> Callable[[], Sequence[BatchHandle]]:
    """Return what reads the rows that a step, from 0, replays."""
    return tuple if inputs.replay is None else partial(inputs.replay.read, step)


def privileged_requests(config: Config, prompt_ids: Sequence[int], step: int) -> list[RolloutRequest]:
    """Return the requests to the privileged sampler in one step, from 0, for given prompts.

    Each is a group of its own where rewards are compared within a prompt's samples.
    """
    section, samples = config.rollout.privileged, config.rollout.samples_per_prompt
    first = step * section.most_prompts if section is not None else 0
    group = -(-PRIVILEGED_IDS // samples)  # the first whose ids are all the sampler's
    return [
        RolloutRequest(
            (group + position) * samples,
            prompt_id,
            0,
            sampling_seed(config.run.seed, _PRIVILEGED, step, prompt_id, 0),
        )
        for position, prompt_id in enumerate(prompt_ids, start=first)
    ]


def held_out_requests(config: Config, inputs: Inputs) -> list[RolloutRequest]:
    """Return the requests of one evaluation; every evaluation of a run has the same seeds."""
    samples = config.evaluation.samples_per_prompt
    return _requests(inputs.held_out_ids, 0, samples, (config.run.seed, _HELD_OUT, 0))


def _requests(prompt_ids: Iterable[int], first: int, samples: int, seed: tuple[int, int, int]) -> list[RolloutRequest]:
    return [
        RolloutRequest(position * samples + sample, prompt_id, sample, sampling_seed(*seed, prompt_id, sample))
        for position, prompt_id in enumerate(prompt_ids, start=first)
        for sample in range(samples)
    ]


def train_sampling(config: Config, max_completion_tokens: int | None = None) -> SamplingSettings:
    """Return how training completions are sampled; without a length, up to the run file's."""
    rollout, needs = config.rollout, config.objective.needs
    return SamplingSettings(
        rollout.max_completion_tokens if max_completion_tokens is None else max_completion_tokens,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        rollout.stop,
        rollout.stop_token_ids,
        stop_class=rollout.stop_class or (),
        stop_repetition=rollout.stop_repetition,
        num_candidates=needs.num_candidates if needs.candidates_from == "student" else 0,
        candidates="sampled" if needs.sampled_candidates else "topk",
    )


def held_out_sampling(config: Config) -> SamplingSettings:
    """Return how held-out completions are sampled: from the model's own distribution, only the temperature set."""
    rollout = config.rollout
    return SamplingSettings(
        rollout.max_completion_tokens,
        config.evaluation.temperature,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
        # At 1, the texts are as likely with a class as without; their scores know the class.
        stop_class=(rollout.stop_class or ()) if config.evaluation.temperature == 1 else (),
        contexts="of_prompt",
    )
