"""Checks the contexts of a run's teachers on all of its prompts, before anything starts, and says how long they get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from cluster.config.run_config import Config
from cluster.config.terms import TEACHER
from cluster.contracts.errors import ConfigError, PreceptorError, PromptError
from rollout_workers.contexts.builder import ContextBuilder, ContextSettings, ScorerContext
from rollout_workers.contexts.template import check_columns, compiled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout_workers.prompts import PromptSet


@dataclass(frozen=True)
class ContextPlan:
    """Holds what the rollout workers must know of the contexts, and how much capacity teachers need for them."""

    settings: ContextSettings | None = None  # None: no teacher has a context
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)  # [teachers.NAME] -> of its longest prompt
    notes: tuple[str, ...] = ()


def plan_contexts(
    config: Config,
    prompts: "PromptSet",
    tokenizer: "PreTrainedTokenizerBase",
    context_tokens: Mapping[str, int],
    now: datetime,
) -> ContextPlan:
    """Render every prompt's contexts, as far as they do not show attempts.

    Args:
        config: of the run; has the teachers' contexts.
        prompts: all of them.
        tokenizer: the student's.
        context_tokens: by [teachers.NAME], of its engine or servers.
        now: what chat templates take for the time.

    Raises:
        ConfigError: a template is none, or reads what can never be there.
        PromptError: a prompt lacks what a template reads, or does not fit with its context.
    """
    if not config.has_contexts:
        return ContextPlan()
    scorers, lengths, notes = [], dict[str, int](), []
    for route in config.routes:
        for name, request in config.scorers(route):
            teacher = config.teachers[name]
            if teacher.context is None:
                continue
            try:
                _check_names(config, name, prompts)
                scorer = ScorerContext(route, request.model, teacher.context, teacher.shuffled_context)
                capacity = context_tokens[name] - config.rollout.max_completion_tokens
                capacity -= config.environment.max_observation_tokens + 1  # a scoring engine generates one token
                scorer, longest, lines = _measured(scorer, config, prompts, tokenizer, capacity, now)
            except PreceptorError as error:
                raise type(error)(f"teachers.{name}.context: {error}") from error
            scorers.append(scorer)
            lengths[name] = max(longest, lengths.get(name, 0))
            notes += [f"teachers.{name}.context: {line}" for line in lines]
    if not scorers:
        return ContextPlan()
    return ContextPlan(ContextSettings(tuple(scorers), config.prompts, now), lengths, tuple(notes))


def prompts_with_contexts(
    settings: ContextSettings | None,
    route: str,
    prompts: "PromptSet",
    numbers: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
) -> "PromptSet | None":
    """Return prompts of which some, of a route, are as the route's teacher reads them; None: it reads the student's.

    Contexts that show attempts are none here.
    """
    scorers = () if settings is None else settings.scorers
    of_route = [one for one in scorers if (one.route, one.model) == (route, TEACHER)]
    if settings is None or not of_route or of_route[0].template.reads_attempts:
        return None
    builder, (scorer,) = ContextBuilder(settings, tokenizer, prompts), of_route
    texts = {
        number: scorer.template.render(builder.inputs(scorer, number, {}))
        for number in numbers
        if prompts.teacher(number) == route
    }
    sources = {number: builder.prompts.source(number) for number, text in texts.items() if text}
    return prompts.with_token_ids({number: builder.tokens(row, texts[number]) for number, row in sources.items()})


def _check_names(config: Config, name: str, prompts: "PromptSet") -> None:
    """Raise ConfigError if the template of a teacher reads what no prompt and no completion of the run has."""
    context = config.teachers[name].context
    assert context is not None
    template = compiled(context.template)
    check_columns(template, prompts)
    others = config.rollout.samples_per_prompt > 1 or context.own_attempt
    if template.reads_group and not others:
        raise ConfigError(
            "the template reads other attempts at the prompt, and rollout.samples_per_prompt = 1 gives none; raise it"
        )
    if config.teachers[name].shuffled_context and len(prompts) < 2:
        raise ConfigError("shuffled_context = true takes the context of another prompt, and there is only one prompt")


def _measured(
    scorer: ScorerContext,
    config: Config,
    prompts: "PromptSet",
    tokenizer: "PreTrainedTokenizerBase",
    capacity: int,
    now: datetime,
) -> tuple[ScorerContext, int, Sequence[str]]:
    """Return the context with its limit of tokens, the tokens that its prompts may have, and what is to be said."""
    builder = ContextBuilder(ContextSettings((scorer,), config.prompts, now), tokenizer, prompts)
    numbers = [number for number in range(len(prompts)) if prompts.teacher(number) == scorer.route]
    lengths = builder.lengths(scorer, numbers)
    longest = max(lengths.values(), default=0)
    if scorer.template.reads_attempts:  # one of them, or the feedback, is as long as a completion
        longest += config.rollout.max_completion_tokens + config.environment.max_observation_tokens
    limit = min(capacity, scorer.config.max_tokens or capacity)
    too_long = [number for number, length in lengths.items() if length > limit]
    if too_long and config.prompts.too_long == "error":
        raise PromptError(
            f"{len(too_long):,} of {len(numbers):,} prompts have no room for it: {builder.name(too_long[0])} has "
            f"{lengths[too_long[0]]} tokens with it, of {limit} that fit; shorten it, or set prompts.too_long = "
            '"skip", which learns nothing from such prompts'
        )
    notes = ["shuffled: the teacher reads that of another prompt"] if scorer.shuffled else []
    absent = len(too_long) + sum(not length for length in lengths.values())
    if absent == len(numbers) > 0:
        raise PromptError(f"none of the {len(numbers):,} prompts has one, so nothing would be learned from")
    if absent:
        notes.append(f"{absent:,} of {len(numbers):,} prompts have none, and nothing is learned from them")
    return replace(scorer, max_tokens=limit), min(longest, limit), notes
