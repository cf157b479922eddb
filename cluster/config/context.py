"""Defines what is read in the place of the student's prompt: `[teachers.NAME.context]` and `[rollout.privileged]`."""

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta
from msgspec.structs import force_setattr
from numpy.typing import NDArray

from cluster.config.fields import (
    SMALLEST_SHARE,
    Count,
    CountOrZero,
    Finite,
    Fraction,
    Items,
    NonNegative,
    Positive,
    Section,
    Text,
    WeightSchedule,
)

MAX_TEMPLATE_BYTES = 1 << 16


class ContextConfig(Section, frozen=True):
    """Sets the prompt that a teacher reads before the student's completion; docs/self_distillation.md has its names.

    A prompt for which the template renders to nothing has no context, and its completions are not learned from.
    """

    template: Text  # Jinja, or a file of it, which is read once, when the run begins
    max_tokens: Items | None = (
        None  # of the teacher's whole prompt: attempts and feedback are cut to fit; None: its room
    )
    min_reward: Finite = 0.5  # of an attempt that counts as successful
    own_attempt: bool = False  # whether a completion may be shown to its teacher as the successful attempt
    wait_seconds: Positive = 600.0  # that a finished completion waits for others of its prompt which the template reads
    compared_rows: Fraction = 0.0  # share of rows scored without the context too, to measure what it says

    def __post_init__(self) -> None:
        force_setattr(self, "template", read_template(self.template))


class GentlenessConfig(Section, frozen=True):
    """Says how gentle a text is to a model: exp(-(strength / sharpness) log mean exp(sharpness d)), in (0, 1].

    d is how far, in nats, each token's log-probability is below that of the model's favourite; a text that greedy
    decoding writes has 1 (Pedagogical RL).
    """

    sharpness: Positive = 5.0  # a high one lets one unlikely token decide
    strength: NonNegative = 0.5

    def of(self, logprobs: NDArray[np.float32], best: NDArray[np.float32]) -> float:
        """Return the gentleness of a text whose tokens, and the favourites there, have these, both [tokens].

        Example:
            >>> GentlenessConfig(strength=0.5).of(np.array([-2.0, -2.0]), np.array([-1.0, -1.0])) == math.exp(-0.5)
            True
        """
        if not len(logprobs):
            return 1.0
        scaled = self.sharpness * np.maximum(best - logprobs, 0.0).astype(np.float64)
        largest = float(scaled.max())
        pooled = largest + math.log(float(np.exp(scaled - largest).mean()))
        return math.exp(-self.strength / self.sharpness * pooled)


class PrivilegedConfig(Section, frozen=True):
    """Sets `[rollout.privileged]`: who writes, for which prompts, and which of its texts is learned from.

    A prompt counts as hard when its last `hard_after` completions, in the steps that asked for it, all failed. For up
    to `prompts_per_step` hard prompts, a step has one further row each. The rollout worker samples
    `samples_per_prompt` texts from the student, or from a teacher, that reads `template` in the place of the prompt,
    has the environment reward them, and lets the student score the right ones without the context.
    """

    # Jinja, or a file of it, as of a teacher's context; it may read the prompt's row alone. None: the prompt itself
    template: Text | None = None
    sampler: Text | None = None  # NAME of the [teachers.NAME] that writes; None: the student with the template
    prompts_per_step: Items | WeightSchedule = 4  # a schedule counts whole prompts
    samples_per_prompt: Annotated[int, Meta(ge=1, le=256)] = 8
    hard_after: Count = 8  # failures in a row
    max_rows: Count = 4  # of a prompt, before it waits for completions without the context to show what they did
    min_reward: Finite = 0.5  # of a completion that counts as right
    # Which right text is learned from: that of the highest log-probability under the student without the context, the
    # gentlest one, or, as a control, the first.
    select: Literal["likelihood", "gentleness", "first"] = "likelihood"
    min_gentleness: Fraction = 0.0  # texts that are less gentle are not learned from
    sharpness: Positive = 5.0  # of gentleness, as GentlenessConfig has them
    strength: NonNegative = 0.5
    shuffled: bool = False  # a control: the context of another prompt
    phase_steps: Count | None = None  # steps with such rows, before `rest_steps` without, and so on; None: all steps
    rest_steps: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.template is None and self.sampler is None:
            raise ValueError(
                "template is missing; the student writes no more with its own prompt than without a sampler"
            )
        force_setattr(self, "template", "{{ prompt }}" if self.template is None else read_template(self.template))
        quota = self.prompts_per_step
        if isinstance(quota, WeightSchedule) and (min(quota.start, quota.to) < 0 or self.most_prompts < 1):
            raise ValueError(
                f"prompts_per_step goes from {quota.start:g} to {quota.to:g}; expected 0 or more, and not 0 alone"
            )
        if self.rest_steps and self.phase_steps is None:
            raise ValueError("rest_steps is for phases; set phase_steps, or remove it")

    @property
    def context(self) -> ContextConfig:
        """Return the template as a context, which the builder of contexts reads."""
        assert self.template is not None, "it is set when the section is read"
        return ContextConfig(self.template)

    @property
    def gentleness(self) -> GentlenessConfig:
        return GentlenessConfig(self.sharpness, self.strength)

    @property
    def label(self) -> str:
        """Return what the rows have in their column `sampler`.

        Example:
            >>> PrivilegedConfig("{{ hint }}").label, PrivilegedConfig(sampler="math").label
            ('privileged:student', 'privileged:math')
        """
        return f"privileged:{self.sampler or 'student'}"

    @property
    def most_prompts(self) -> int:
        """Return the largest quota of any step."""
        quota = self.prompts_per_step
        return int(max(quota.start, quota.to)) if isinstance(quota, WeightSchedule) else quota

    def quota(self, step: int) -> int:
        """Return how many rows of the sampler optimizer step `step`, from 0, may have.

        Example:
            >>> config = PrivilegedConfig("{{ hint }}", phase_steps=2, rest_steps=1)
            >>> [config.quota(step) for step in range(6)]
            [4, 4, 0, 4, 4, 0]
            >>> fading = PrivilegedConfig("{{ hint }}", prompts_per_step=WeightSchedule(start=8, to=0, over_steps=4))
            >>> [fading.quota(step) for step in range(6)]
            [8, 6, 4, 2, 0, 0]
        """
        if self.phase_steps is not None:
            place = step % (self.phase_steps + self.rest_steps) if self.rest_steps else step
            if place >= self.phase_steps:
                return 0
        quota = self.prompts_per_step
        return int(quota.at(step) + SMALLEST_SHARE) if isinstance(quota, WeightSchedule) else quota


def read_template(template: str) -> str:
    """Return a template's text, from its file if it names one; raise ValueError if it is neither."""
    if "{" in template:
        return template
    path = Path(template)
    if "\n" in template or not path.is_file():
        raise ValueError(
            f"template {template[:60]!r} is neither a file nor a Jinja template, which has a {{{{ name }}}}"
        )
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"template {template} has more than {MAX_TEMPLATE_BYTES:,} bytes; it is no template")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template {template} cannot be read: {error}") from error
    if "{" not in text:
        raise ValueError(f"template {path} reads nothing of the prompt; it needs a {{{{ prompt }}}} at least")
    return text
