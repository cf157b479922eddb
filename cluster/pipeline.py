"""Everything a run needs, read and started in the right order: inputs first, so that bad ones cost no start-up."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.contracts.config import Config
from cluster.contracts.interfaces import RolloutRequest, SamplingSettings
from cluster.model_files import context_length, load_model_config, load_tokenizer
from cluster.placement import Placement
from cluster.self_checks import check_tokenizers
from learner.group import LearnerGroup
from rollout_workers.pool import RolloutPool
from rollout_workers.prompts import PromptOrder, PromptSet, load_prompts, sampling_seed
from teacher_workers.pool import TeacherPool, TeacherPools

_TRAIN, _HELD_OUT = 0, 1  # keep the draws of training and evaluation apart


@dataclass(frozen=True)
class Inputs:
    """The prompts of a run: training prompts first, held-out ones after them, under one numbering."""

    prompts: PromptSet
    train: PromptOrder
    held_out_ids: tuple[int, ...]
    max_model_len: int  # longest prompt + completion + 1: the context that every engine must offer


@dataclass(frozen=True)
class Pipeline:
    """The running pools."""

    rollouts: RolloutPool
    teachers: TeacherPools
    learner: LearnerGroup


def load_inputs(config: Config) -> Inputs:
    """Read models' configurations, tokenizers and prompt files, and check that they fit each other.

    Raises:
        ModelError: a model is missing, or a teacher's tokenizer is not the student's.
        PromptError: a prompt file is missing, malformed, or has a prompt that does not fit a context.
    """
    student = config.student
    tokenizer = load_tokenizer(student.model, student.trust_remote_code)
    contexts = [context_length(load_model_config(student.model, student.trust_remote_code))]
    teacher_tokenizers = {}
    for name, teacher in config.teachers.items():
        teacher_tokenizers[name] = load_tokenizer(teacher.model, teacher.trust_remote_code)
        contexts.append(context_length(load_model_config(teacher.model, teacher.trust_remote_code)))
    check_tokenizers(tokenizer, teacher_tokenizers, compare_templates=config.prompts.template == "chat")
    train = load_prompts(Path(config.prompts.train), tokenizer, config, min(contexts))
    parts = [train]
    if config.prompts.held_out is not None:
        parts.append(load_prompts(Path(config.prompts.held_out), tokenizer, config, min(contexts)))
    prompts = PromptSet.join(parts)
    return Inputs(
        prompts=prompts,
        train=PromptOrder(len(train), config.run.seed, config.prompts.shuffle),
        held_out_ids=tuple(range(len(train), len(prompts)))[: config.evaluation.num_prompts or None],
        max_model_len=prompts.longest_tokens + config.rollout.max_completion_tokens + 1,
    )


def train_requests(config: Config, inputs: Inputs, step: int) -> list[RolloutRequest]:
    """Return the completions that one step asks for: the same ones whenever the step is done again."""
    count, samples = config.prompts.prompts_per_step, config.rollout.samples_per_prompt
    first = step * count
    return [
        RolloutRequest(
            trajectory_id=(first + position) * samples + sample,
            prompt_id=prompt_id,
            sample_index=sample,
            seed=sampling_seed(config.run.seed, _TRAIN, step, prompt_id, sample),
        )
        for position, prompt_id in enumerate(inputs.train.take(first, count))
        for sample in range(samples)
    ]


def held_out_requests(config: Config, inputs: Inputs) -> list[RolloutRequest]:
    """Return the completions of one evaluation; every evaluation of a run asks for the same draws."""
    samples = config.evaluation.samples_per_prompt
    return [
        RolloutRequest(
            trajectory_id=position * samples + sample,
            prompt_id=prompt_id,
            sample_index=sample,
            seed=sampling_seed(config.run.seed, _HELD_OUT, 0, prompt_id, sample),
        )
        for position, prompt_id in enumerate(inputs.held_out_ids)
        for sample in range(samples)
    ]


def train_sampling(config: Config) -> SamplingSettings:
    """Return how training completions are drawn."""
    rollout = config.rollout
    return SamplingSettings(
        rollout.max_completion_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.stop
    )


def held_out_sampling(config: Config) -> SamplingSettings:
    """Return how held-out completions are drawn: from the model's own distribution, only the temperature set."""
    rollout = config.rollout
    return SamplingSettings(rollout.max_completion_tokens, config.evaluation.temperature, stop=rollout.stop)


@contextmanager
def start_pipeline(config: Config, inputs: Inputs, placement: Placement) -> Iterator[Pipeline]:
    """Start all pools at once and end them, with every process of theirs, when the `with` statement ends."""
    with ExitStack() as stack:
        rollouts, learner, *teachers = _start_together(
            stack,
            [
                lambda: start_rollouts(config, inputs, placement),
                lambda: LearnerGroup(config, placement.learner.options()),
                *(_teacher_starter(config, inputs, placement, name) for name in config.teachers),
            ],
        )
        yield Pipeline(rollouts, TeacherPools(dict(zip(config.teachers, teachers, strict=True))), learner)


def start_rollouts(config: Config, inputs: Inputs, placement: Placement) -> RolloutPool:
    """Start the student's generators."""
    raise NotImplementedError
