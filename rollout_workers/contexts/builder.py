"""Builds what teachers read in the place of the student's prompt, from a prompt's row and its attempts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cluster.config.context import ContextConfig
from cluster.config.sections import PromptsConfig
from cluster.config.terms import TEACHER
from cluster.contracts.errors import PromptError, RolloutError
from cluster.contracts.metrics import Mean, Metric, Sum
from cluster.contracts.requests import ContextUse
from cluster.contracts.trajectory import GeneratedTrajectory, Ints, masked
from rollout_workers.contexts.groups import Attempt
from rollout_workers.contexts.template import ContextTemplate, compiled
from rollout_workers.prompt_row import PromptRow
from rollout_workers.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rollout_workers.prompts import PromptSet

HASH_BYTES = 8
CUTS = 4  # times that the shown attempts are cut, since a cut text may have more tokens than were left of it
SPARE_TOKENS = 4  # by which a cut goes further than needed, for the same reason
EARLY = 0.1  # share of a completion's text in which its answer is early
MIN_CHARACTERS = 40  # of a completion that has room for work before its answer
_THINKING = re.compile(r"<think>.*", re.DOTALL)  # that did not end

# What a template may meet: a right attempt and feedback, or nothing of them.
EXAMPLES: Sequence[Mapping[str, Any]] = (
    {"attempt": "0", "attempts": [{"text": "0", "reward": 1.0}], "own_attempt": "0", "reward": 1.0, "feedback": "0"},
    {"attempt": "", "attempts": [], "own_attempt": "", "reward": 0.0, "feedback": ""},
)

NONE: Ints = np.empty(0, np.int32)


@dataclass(frozen=True)
class ScorerContext:
    """Says what one scoring model reads of the completions of one route."""

    route: str
    model: str  # its role in the objective's target
    config: ContextConfig
    shuffled: bool = False  # the control: another prompt's columns, answer and attempts
    max_tokens: int = 1 << 30  # of the prompt that it reads

    @property
    def template(self) -> ContextTemplate:
        return compiled(self.config.template)


@dataclass(frozen=True)
class ContextSettings:
    """Says what all scoring models of a run read; equal for all rollout workers."""

    scorers: tuple[ScorerContext, ...]
    prompts: PromptsConfig
    now: datetime  # what chat templates take for the time

    @property
    def models(self) -> tuple[str, ...]:
        """Return the models that have prompts of their own somewhere; all rows of the run have a column for each."""
        return tuple(dict.fromkeys(scorer.model for scorer in self.scorers))


def plain_contexts(settings: ContextSettings | None) -> ContextSettings | None:
    """Return contexts that say no more than the prompt, built and sent as those of the run."""
    if settings is None:
        return None
    plain = [
        replace(scorer, config=msgspec.structs.replace(scorer.config, template="{{ prompt }}"), shuffled=False)
        for scorer in settings.scorers
    ]
    return replace(settings, scorers=tuple(plain))


@dataclass(frozen=True)
class ReadPrompt:
    """Holds what one scoring model reads in the place of the prompt; without token ids, it has no context."""

    token_ids: Ints
    inputs: Mapping[str, Any]  # of the template, those that it reads
    is_cut: bool = False


class ContextBuilder:
    """Adds the scoring models' prompts to finished trajectories."""

    def __init__(self, settings: ContextSettings, tokenizer: "PreTrainedTokenizerBase", prompts: "PromptSet") -> None:
        self.settings, self.prompts, self._tokenizer = settings, prompts, tokenizer
        self._groups: list[Sequence[Attempt]] = []  # the last two, for shuffled contexts

    def waits(self, route: str) -> bool:
        """Return whether a completion's context may show others of its prompt."""
        return any(scorer.template.reads_group for scorer in self.settings.scorers if scorer.route == route)

    @property
    def wait_seconds(self) -> float:
        return max(scorer.config.wait_seconds for scorer in self.settings.scorers)

    def add(
        self, attempt: Attempt, group: Sequence[Attempt], use: ContextUse
    ) -> tuple[GeneratedTrajectory, dict[str, Metric]]:
        """Return the row that travels, and what there is to measure of it.

        A row without a context for its teacher is masked: it has no sampled token any more, so it adds no loss and is
        none of the tokens that the loss is divided by. `use` says which contexts are built; masked are training's only.
        """
        row = attempt.trajectory
        prompts, digest = dict.fromkeys(self.settings.models, NONE), blake2b(digest_size=HASH_BYTES)
        metrics: dict[str, Metric] = {}
        for scorer in self.settings.scorers:
            if scorer.route != row.teacher or use == "none" or (use == "of_prompt" and scorer.template.reads_attempts):
                continue
            read = self.read(scorer, attempt, group)
            prompts[scorer.model] = self._continued(row, read.token_ids)
            digest.update(msgspec.json.encode([scorer.model, scorer.config.template, read.inputs], order="sorted"))
            if scorer.model == TEACHER:
                metrics = self._metrics(read, attempt)
        if not any(map(len, prompts.values())):
            is_masked = bool(metrics) and use == "all"
            return replace(masked(row) if is_masked else row, scorer_prompts=prompts), metrics
        return replace(row, scorer_prompts=prompts, context_hash=digest.hexdigest()), metrics

    def _continued(self, row: GeneratedTrajectory, context: Ints) -> Ints:
        """Return a context, and what else the student read before the row's first sampled token.

        There is more where an environment opens with more than the prompt, and in further rows of an episode.
        """
        if not len(context) or not row.loss_mask.any():
            return context
        prompt, first = self.prompts.prompt(row.prompt_id).token_ids, int(row.loss_mask.argmax())
        if np.array_equal(row.token_ids[: len(prompt)], prompt):
            return np.concatenate([context, row.token_ids[len(prompt) : first]])
        if row.turn:
            raise RolloutError(
                f"trajectory {row.episode}: the further row at turn {row.turn + 1} does not begin with the prompt, in "
                f"whose place teachers.{row.teacher}.context stands; remove the context"
            )
        return context

    def read(self, scorer: ScorerContext, attempt: Attempt, group: Sequence[Attempt]) -> ReadPrompt:
        """Return what a scoring model reads of one completion; what is too long is cut."""
        prompt_id, is_cut = attempt.trajectory.prompt_id, False
        if scorer.shuffled:
            attempt, group = self._before(attempt, group)
        inputs = self.inputs(scorer, prompt_id, shown_attempts(scorer.config, attempt, group))
        source = self.prompts.source(prompt_id)
        for _ in range(CUTS + 1):
            token_ids = self.tokens(source, scorer.template.render(inputs))
            excess = len(token_ids) - scorer.max_tokens
            if excess <= 0:
                return ReadPrompt(token_ids, inputs, is_cut)
            shorter = self._cut(inputs, excess + SPARE_TOKENS)
            if shorter == inputs:
                break
            inputs, is_cut = shorter, True
        return ReadPrompt(NONE, inputs, is_cut)

    def tokens(self, source: PromptRow, text: str) -> Ints:
        """Return a prompt's tokens with a text in the place of the user's last message; none for an empty text."""
        return self.tokenise([self.prompt_with(source, text)])[0] if text else NONE

    def prompt_with(self, source: PromptRow, text: str) -> str:
        """Return what the student's template makes of a prompt with a text in the place of the user's last message."""
        prompt: Any = text
        if not isinstance(source.prompt, str):
            last = _last_of_user(source.prompt)
            prompt = [*source.prompt]
            prompt[last] = {**prompt[last], "content": text}
        changed, settings = msgspec.structs.replace(source, prompt=prompt), self.settings
        return render(changed, self._tokenizer, settings.prompts, settings.now, "the student")

    def tokenise(self, rendered: Sequence[str]) -> list[Ints]:
        ids = self._tokenizer(list(rendered), add_special_tokens=self.settings.prompts.template == "raw")["input_ids"]
        return [np.asarray(of_one, np.int32) for of_one in ids]

    def lengths(self, scorer: ScorerContext, numbers: Sequence[int]) -> dict[int, int]:
        """Return each prompt's tokens with its context, in which short texts stand for attempts; 0: it has none.

        Raises:
            PromptError: the template fails on a prompt, which it names.
        """
        rendered: dict[int, str] = {}
        examples = EXAMPLES if scorer.template.reads_attempts else EXAMPLES[:1]
        for number in numbers:
            source = self.prompts.source(number)
            try:
                texts = [scorer.template.render(self.inputs(scorer, number, example)) for example in examples]
                if longest := max(texts, key=len):
                    rendered[number] = self.prompt_with(source, longest)
            except PromptError as error:
                raise PromptError(f"{self.name(number)}: {error}") from error
        # One call for all of them: called once per prompt, a tokenizer spends its time in Python.
        token_ids = self.tokenise(list(rendered.values())) if rendered else []
        lengths = {number: len(ids) for number, ids in zip(rendered, token_ids, strict=True)}
        return {number: lengths.get(number, 0) for number in numbers}

    def name(self, prompt_id: int) -> str:
        return f"the prompt {user_text(self.prompts.source(prompt_id))[:60]!r}"

    def inputs(self, scorer: ScorerContext, prompt_id: int, attempts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a template reads of a prompt's row, and of the attempts, as `shown_attempts` gives them."""
        own = shown = self.prompts.source(prompt_id)
        if scorer.shuffled:
            shown = self.prompts.source((prompt_id + max(1, len(self.prompts) // 2)) % len(self.prompts))
        inputs = {
            **shown.columns,
            "columns": shown.columns,
            "prompt": user_text(own),
            "answer": shown.answer,
            "domain": shown.domain,
            **attempts,
        }
        return {name: inputs[name] for name in sorted(scorer.template.names & inputs.keys())}

    def _before(self, attempt: Attempt, group: Sequence[Attempt]) -> tuple[Attempt, Sequence[Attempt]]:
        """Return the attempts of the prompt that was finished before this one, if there was one."""
        if not self._groups or self._groups[-1][0].trajectory.prompt_id != attempt.trajectory.prompt_id:
            self._groups = [*self._groups[-1:], group or (attempt,)]
        if len(self._groups) < 2:
            return Attempt(attempt.trajectory), ()
        return self._groups[0][0], self._groups[0]

    def _cut(self, inputs: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
        """Return the inputs with so many tokens less at the end of the longest text that an attempt or feedback has."""
        texts = {name: inputs[name] for name in ("attempt", "own_attempt", "feedback") if inputs.get(name)}
        attempts = [dict(attempt) for attempt in inputs.get("attempts", ())]
        texts |= {str(at): attempt["text"] for at, attempt in enumerate(attempts) if attempt["text"]}
        if not texts:
            return dict(inputs)
        longest = max(texts, key=lambda name: len(texts[name]))
        ids = self._tokenizer(texts[longest], add_special_tokens=False)["input_ids"]
        left = self._tokenizer.decode(ids[: max(0, len(ids) - num_tokens)])
        if longest in inputs:
            return {**inputs, longest: left}
        attempts[int(longest)]["text"] = left
        return {**inputs, "attempts": attempts}

    def _metrics(self, read: ReadPrompt, attempt: Attempt) -> dict[str, Metric]:
        row = attempt.trajectory
        metrics: dict[str, Metric] = {
            "context/missing_rows": Sum(float(not len(read.token_ids))),
            "context/cut_ratio": Mean(float(read.is_cut), 1.0),
        }
        if len(read.token_ids):
            metrics["context/tokens"] = Mean(float(len(read.token_ids)), 1.0)
        source = self.prompts.source(row.prompt_id)
        is_early = answers_early(attempt.text, source.answer, user_text(source))
        if is_early is not None:
            metrics["context/early_answer_ratio"] = Mean(float(is_early), 1.0)
        return metrics


def shown_attempts(config: ContextConfig, attempt: Attempt, group: Sequence[Attempt]) -> dict[str, Any]:
    """Return what a template may read of a completion and of the others of its prompt.

    The successful attempt is the next one in the order of the samples, which begins again after the last.
    """
    row = attempt.trajectory
    later_first = sorted(group, key=lambda one: (one.trajectory.sample_index <= row.sample_index, _sample(one)))
    others = [one for one in later_first if one.trajectory.trajectory_id != row.trajectory_id]
    candidates = [*others, attempt] if config.own_attempt else others
    right = [one for one in candidates if (one.trajectory.reward or 0.0) >= config.min_reward]
    return {
        "attempt": without_thinking(right[0].text) if right else "",
        "attempts": [{"text": without_thinking(one.text), "reward": one.trajectory.reward or 0.0} for one in others],
        "own_attempt": without_thinking(attempt.text),
        "reward": row.reward or 0.0,
        "feedback": attempt.feedback,
    }


def _sample(attempt: Attempt) -> int:
    return attempt.trajectory.sample_index


def without_thinking(text: str) -> str:
    """Return what follows the last `</think>`, without a thought that never ended.

    Example:
        >>> without_thinking("<think>2 and 2</think> 4"), without_thinking("4 <think>or")
        ('4', '4')
    """
    return _THINKING.sub("", text.rpartition("</think>")[2]).strip()


def answers_early(text: str, answer: str | None, prompt: str) -> bool | None:
    """Return whether the answer stands in the first tenth of a completion, before any work.

    None: it has no answer of its own, is too short to have room for work, or does not have the answer's very words.

    Example:
        >>> answers_early("42 is what comes out when 6 is multiplied by 7, as asked.", "42", "6 * 7 = ?")
        True
    """
    if not answer or answer in prompt or len(text) < MIN_CHARACTERS:
        return None
    place = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)
    return None if place is None else place.start() < EARLY * len(text)


def user_text(prompt: PromptRow) -> str:
    """Return what a template reads as `prompt`: the text, or the last message of the user."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    return str(prompt.prompt[_last_of_user(prompt.prompt)].get("content") or "")


def _last_of_user(messages: Sequence[Mapping[str, Any]]) -> int:
    of_user = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return of_user[-1] if of_user else len(messages) - 1
