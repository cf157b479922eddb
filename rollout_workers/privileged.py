"""Writes rows for prompts that the student alone never solves: samples with a context, verifies, selects one text.

The student that reads a hint in the place of its prompt writes several texts; the environment rewards them; those that
are right are scored without the hint, by the weights of now. One of them becomes a row of the prompt without the hint,
whose `rollout_logprobs` are those of the sampler. Sources: Pedagogical RL (Chakraborty et al.) and TREK (arXiv
2607.05339).
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cluster.actors.named_actors import AGAIN, NamedActors
from cluster.config.context import PrivilegedConfig
from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError, PreceptorError, RolloutError
from cluster.contracts.metrics import Mean, Metric, Sum
from cluster.contracts.protocols import Generator, RolloutEngine
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import STUDENT, Floats, GeneratedTrajectory, Ints, masked
from rollout_workers.contexts.builder import ContextBuilder, ContextSettings, ScorerContext
from rollout_workers.contexts.groups import Attempt
from rollout_workers.contexts.template import check_columns
from rollout_workers.prompts import PromptSet, sampling_seed

if TYPE_CHECKING:
    from datetime import datetime

    from transformers import PreTrainedTokenizerBase

REPLACED = r"(@[0-9a-f]+)?"  # in the names of the workers of a teacher that took another's place
# Samples one text of a request, in an engine or else the worker's own, whose model reads these tokens in the place of
# the prompt.
Sample = Callable[[RolloutRequest, SamplingSettings, int, Ints, Generator | None], Awaitable[Attempt]]


@dataclass(frozen=True)
class PrivilegedSettings:
    """Says what the privileged sampler of a run does; equal for all rollout workers."""

    config: PrivilegedConfig
    contexts: ContextSettings  # of no scorer: how prompts are rendered
    retry_seconds: float = 0.0  # that a request waits for a worker of the teacher that writes

    @property
    def scorer(self) -> ScorerContext:
        """Return the sampler's context in the form that the builder of contexts reads."""
        return ScorerContext("", self.config.label, self.config.context, self.config.shuffled)


@dataclass(frozen=True)
class PrivilegedPlan:
    """Holds what follows from the prompts of a run for its privileged sampler."""

    settings: PrivilegedSettings | None = None  # None: there is none
    prompt_ids: frozenset[int] = frozenset()  # of prompts that have a context
    prompt_tokens: int = 0  # of the longest prompt with its context
    notes: tuple[str, ...] = ()


def plan_privileged(
    config: Config,
    prompts: PromptSet,
    num_train: int,
    tokenizer: "PreTrainedTokenizerBase",
    context_tokens: int,
    now: "datetime",
) -> PrivilegedPlan:
    """Render every training prompt as the sampler reads it.

    Args:
        config: of the run.
        prompts: all of them, training prompts first.
        num_train: how many these are.
        tokenizer: the student's.
        context_tokens: of the model that writes.
        now: what chat templates take for the time.

    Raises:
        ConfigError: the template is none, or reads what is not there before a completion is.
        PromptError: a prompt lacks what the template reads.
    """
    section = config.rollout.privileged
    if section is None:
        return PrivilegedPlan()
    retry_seconds = 0.0 if section.sampler is None else config.teachers[section.sampler].retry_seconds
    settings = PrivilegedSettings(section, ContextSettings((), config.prompts, now), retry_seconds)
    try:
        _check_template(settings.scorer, config, prompts)
        builder = ContextBuilder(settings.contexts, tokenizer, prompts)
        lengths = builder.lengths(settings.scorer, range(num_train))
    except PreceptorError as error:
        raise type(error)(f"rollout.privileged: {error}") from error
    capacity = context_tokens - config.rollout.max_completion_tokens - config.environment.max_observation_tokens - 1
    fitting = {number: length for number, length in lengths.items() if 0 < length <= capacity}
    if not fitting:
        raise ConfigError(f"rollout.privileged: none of the {num_train:,} prompts has a context that fits")
    absent = num_train - len(fitting)
    notes = [f"rollout.privileged: {absent:,} of {num_train:,} prompts have no context, or no room for it"]
    return PrivilegedPlan(settings, frozenset(fitting), max(fitting.values()), tuple(notes[: bool(absent)]))


def _check_template(scorer: ScorerContext, config: Config, prompts: PromptSet) -> None:
    if scorer.template.reads_attempts:
        raise ConfigError("the template reads an attempt, and the sampler writes before there is one")
    for name, teacher in config.teachers.items():
        if teacher.context is not None and ScorerContext(name, "", teacher.context).template.reads_group:
            raise ConfigError(
                f"teachers.{name}.context shows other attempts at a prompt, and a row of the sampler has none"
            )
    check_columns(scorer.template, prompts)
    if scorer.shuffled and len(prompts) < 2:
        raise ConfigError("shuffled = true takes the context of another prompt, and there is only one prompt")


@dataclass(frozen=True)
class BlindScores:
    """Holds what the student without the context says of a text."""

    logprobs: Floats  # [completion_tokens]
    best: Floats  # [completion_tokens] log-probability of the student's favourite there

    @property
    def likelihood(self) -> float:
        """Return the log-probability of the whole text, in nats."""
        return float(self.logprobs.sum(dtype=np.float64))

    def gentleness(self, config: PrivilegedConfig) -> float:
        return config.gentleness.of(self.logprobs, self.best)


class PrivilegedSampler:
    """Answers requests of the privileged sampler with one row each; one without a text to learn from is masked."""

    def __init__(
        self,
        settings: PrivilegedSettings,
        builder: ContextBuilder,
        engine: RolloutEngine,
        sample: Sample,
        writer: Generator | None = None,
    ) -> None:
        """Take the student's engine, which scores, and the one that writes; None: the same."""
        self._config, self._scorer = settings.config, settings.scorer
        self._builder, self._engine, self._sample, self._writer = builder, engine, sample, writer

    async def answer(self, request: RolloutRequest, sampling: SamplingSettings, priority: int) -> Attempt:
        """Sample, verify and select; all texts of a request run at once."""
        prompt_ids = self.prompt_ids(request.prompt_id)
        tries = [
            replace(request, seed=sampling_seed(request.seed, request.prompt_id, number))
            for number in range(self._config.samples_per_prompt)
        ]
        attempts = await asyncio.gather(
            *(self._sample(one, sampling, priority, prompt_ids, self._writer) for one in tries)
        )
        right = [one for one in attempts if (one.trajectory.reward or 0.0) >= self._config.min_reward]
        scores = await asyncio.gather(*(self._score(one, priority) for one in right))
        chosen = select(self._config, scores)
        attempt = attempts[0] if chosen is None else right[chosen]
        rows = [masked(row) if chosen is None else row for row in _rows(attempt)]
        *earlier, last = (replace(row, sampler=self._config.label) for row in rows)
        metrics = sampler_metrics(self._config, attempts, scores, chosen)
        return replace(attempt, trajectory=last, earlier=tuple(earlier), metrics=metrics)

    def prompt_ids(self, prompt_id: int) -> Ints:
        """Return what the sampler reads in the place of a prompt."""
        inputs = self._builder.inputs(self._scorer, prompt_id, {})
        return self._builder.tokens(self._builder.prompts.source(prompt_id), self._scorer.template.render(inputs))

    async def _score(self, attempt: Attempt, priority: int) -> BlindScores:
        """Read a text after the prompt without the context; of an episode of several rows, all."""
        asked = []
        for row in _rows(attempt):
            places = np.flatnonzero(row.loss_mask).astype(np.int32)
            name = f"{row.trajectory_id}-blind-{id(row)}"
            asked.append(self._engine.prompt_logprobs(name, row.token_ids, places, 1, priority))
        logprobs = np.concatenate([of_row for _, of_row in await asyncio.gather(*asked)])
        return BlindScores(logprobs[:, 0], logprobs[:, 1])


def _rows(attempt: Attempt) -> tuple[GeneratedTrajectory, ...]:
    return (*attempt.earlier, attempt.trajectory)


class TeacherEngine:
    """Asks the worker of a teacher that has the fewest texts to write."""

    def __init__(self, teacher: str, retry_seconds: float, policy_version: Callable[[], int]) -> None:
        """Take [teachers.NAME], how long a call waits for a worker, and the version of the student's weights.

        Every token is labelled with that version: the student of then selects the text and learns from it.
        """
        names = rf"teacher-{re.escape(teacher)}{REPLACED}-\d+{AGAIN}"
        self._teacher, self._retry_seconds = teacher, retry_seconds
        self._actors = NamedActors(names, retry_seconds, RolloutError)
        self._policy_version = policy_version

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion; raise RolloutError if no worker of the teacher does."""
        completion = await self._actors.call(
            lambda actor: actor.generate.remote(prompt_ids, sampling, seed, priority),
            load=1,
            otherwise=f"request {request_id}: no worker of teacher {self._teacher} wrote within teachers."
            f"{self._teacher}.retry_seconds = {self._retry_seconds:g}; see what `preceptor status` says of it",
        )
        versions = np.full(len(completion.token_ids), self._policy_version(), np.int32)
        return replace(completion, policy_versions=versions)


def select(config: PrivilegedConfig, scores: Sequence[BlindScores]) -> int | None:
    """Return which of the right texts is learned from; None: there is none that is gentle enough."""
    gentle = [index for index, one in enumerate(scores) if one.gentleness(config) >= config.min_gentleness]
    if not gentle or config.select == "first":
        return gentle[0] if gentle else None
    if config.select == "gentleness":
        return max(gentle, key=lambda index: scores[index].gentleness(config))
    return max(gentle, key=lambda index: scores[index].likelihood)


def sampler_metrics(
    config: PrivilegedConfig, attempts: Sequence[Attempt], scores: Sequence[BlindScores], chosen: int | None
) -> dict[str, Metric]:
    """Return what one prompt's texts say of the sampler; `scores` are of the right ones."""
    gentleness = [one.gentleness(config) for one in scores]
    metrics: dict[str, Metric] = {
        "privileged/tokens": Sum(float(sum(len(row.rollout_logprobs) for one in attempts for row in _rows(one)))),
        "privileged/prompts": Sum(1.0),
        "privileged/solve_rate": Mean(float(len(scores)), float(len(attempts))),
        "privileged/acceptance": Mean(float(chosen is not None), 1.0),
    }
    if scores:
        metrics["privileged/gentleness"] = Mean(sum(gentleness), float(len(scores)))
    if chosen is not None:
        metrics["privileged/chosen_gentleness"] = Mean(gentleness[chosen], 1.0)
        metrics["privileged/chosen_logprob"] = Mean(scores[chosen].likelihood, float(len(scores[chosen].logprobs)))
    return metrics


def own_rows(rows: Sequence[GeneratedTrajectory]) -> list[GeneratedTrajectory]:
    """Return the rows that the student sampled from its own prompts."""
    return [row for row in rows if row.sampler == STUDENT]
