"""Describes what the student minimises: terms that are added up, the tokens they read, the models they compare with.

`terms.py` describes the terms. `docs/objective.md` gives the formula and says which published method is which
configuration; `presets.py` names them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, field
from msgspec.structs import replace

from cluster.config.fields import SMALLEST_SHARE, CountOrZero, Items, NonNegative, Positive, Section, WeightSchedule
from cluster.config.terms import (
    OF_GROUP,
    OF_MODELS,
    OUTSIDE_SUPPORT,
    TEACHER,
    AnyTerm,
    CrossEntropyTerm,
    DivergenceTerm,
    PolicyGradientTerm,
    RepresentationTerm,
    Support,
    TaskRewardTerm,
)


@dataclass(frozen=True)
class Needs:
    """Says what an objective needs sampled, scored and read; whatever asks for it, asks here.

    Example:
        >>> ObjectiveConfig().needs.candidates_from, ObjectiveConfig(support="full").needs.hidden
        ('teacher', True)
    """

    models: tuple[str, ...]  # that score every completion: those of the targets, the routed teacher first
    num_candidates: int  # tokens per position that are listed and compared, besides the sampled one
    candidates_from: Literal["student", "teacher"] | None  # whose tokens the candidates are; None: there are none
    sampled_candidates: bool  # the candidates are independent draws of the student, like the sampled token
    intersection: bool  # only those candidates count that the student, now, has among its most likely ones too
    hidden: bool  # whole distributions, from the models' hidden states and LM heads
    last_states: tuple[str, ...]  # models whose last hidden states the student's are compared with
    layer_states: tuple[str, ...]  # models that send hidden states of `representation`'s layers
    teacher_entropy: bool  # at every position
    first_pass: bool  # what the current student says of a whole trajectory, before its first loss
    divides_by_deviation: bool | None  # how rewards within a prompt's samples are normalised; None: no rewards
    step_means: bool  # mean advantages of the whole step under the current student, before its first loss
    whole_step: bool  # all of a step's trajectories, before its first loss


class TokenWeightsConfig(Section, frozen=True):
    """Says how much each completion token counts; all given weights multiply. Token counts are never renormalised."""

    first_tokens: Items | None = None  # only so many at the start of each completion
    first_fraction: Annotated[float, Meta(gt=0, le=1)] | None = None  # only this part of each completion
    skip_first: CountOrZero = 0  # not so many at the start of each completion
    # After so many tokens over which sampler and teacher agree to `stop_below` nats on average, the rest of a
    # completion is neither read nor learned from; 0: all is
    stop_window: CountOrZero = 0
    stop_below: NonNegative = 0.05
    special_tokens: bool = True  # false: not what the tokenizer calls special, but for tokens that end a completion
    stop_tokens: bool = True  # false: not the tokens that end a completion
    # How much each teacher's tokens count together, in a step: as many as they are, all teachers alike, or as given
    teacher_shares: Literal["tokens", "equal"] | dict[str, Positive] = "tokens"
    # How much each turn of a row counts: as many tokens as it has, or all alike, each as their mean (TurnOPD)
    turns: Literal["tokens", "equal"] = "tokens"
    # Only so many turns at the start of each episode; a schedule counts whole turns (TCOD)
    first_turns: Items | WeightSchedule | None = None
    position_importance: NonNegative = 0.0  # extra weight of early tokens (IW-OPD's gamma)
    entropy: Literal["none", "student", "teacher", "both"] = "none"  # FiRe: unsure student, sure teacher

    def __post_init__(self) -> None:
        if self.first_tokens is not None and self.skip_first >= self.first_tokens:
            raise ValueError(f"skip_first = {self.skip_first} leaves nothing of first_tokens = {self.first_tokens}")
        schedule = self.first_turns
        if isinstance(schedule, WeightSchedule) and min(schedule.start, schedule.to) < 1:
            raise ValueError(f"first_turns goes from {schedule.start:g} to {schedule.to:g}; expected 1 or more turns")

    def at(self, step: int) -> "TokenWeightsConfig":
        """Return the weights of optimizer step `step`, from 0, in which the number of turns is a number."""
        if not isinstance(self.first_turns, WeightSchedule):
            return self
        return replace(self, first_turns=int(self.first_turns.at(step) + SMALLEST_SHARE))


class ObjectiveConfig(Section, frozen=True):
    """Adds up the terms, per completion token."""

    preset: str | None = None  # a name of presets.py; whatever else is written here overrides it
    support: Support = "topk"  # the tokens per position on which models are compared
    support_size: Items = 16  # all supports but sampled and full; of `samples`, the sampled token is one
    terms: Annotated[dict[str, AnyTerm], Meta(min_length=1)] = field(default_factory=lambda: {"main": DivergenceTerm()})
    token_weights: TokenWeightsConfig = TokenWeightsConfig()

    def __post_init__(self) -> None:
        if self.support == "samples" and self.support_size < 2:
            raise ValueError("objective.support = 'samples' needs support_size = 2 or more; one draw is 'sampled'")
        if len(self._normalisations()) > 1:
            raise ValueError("objective.terms: all task_reward terms must have the same divide_by_deviation")
        for name, term in self.terms.items():
            if term.when == OUTSIDE_SUPPORT and self.support in ("sampled", "samples", "full"):
                raise ValueError(
                    f"objective.terms.{name}: when = 'outside_support' needs support topk, student_topk or "
                    f"intersection, found '{self.support}'"
                )
            if term.when in OF_MODELS and len(term.target) < 2:
                raise ValueError(
                    f"objective.terms.{name}: when = '{term.when}' compares the models of the term's target, which has "
                    "one; name another, with coefficient 0 if it shall only be compared"
                )
            if fault := term.fault(self.support):
                raise ValueError(f"objective.terms.{name}: {fault}")
        if len({(term.layers, term.bank) for term in self._of_states() if not term.reads_last}) > 1:
            raise ValueError("objective.terms: all representation terms must have the same layers and bank")

    def check_other_samplers(self) -> None:
        """Raise ValueError if a term cannot learn from rows that another sampler than the student's own wrote."""
        for name, term in self.terms.items():
            if not term.valid_for_other_samplers and term.rows != "student":
                kind = term.__struct_config__.tag
                raise ValueError(
                    f"objective.terms.{name}: a {kind} learns from rows of another sampler by the current student's "
                    "advantage and its ratio to the sampler; take importance.kind = 'truncated' and student = "
                    "'current', or loss = 'cross_entropy', or rows = 'student'"
                )

    def check_privileged(self, has_sampler: bool) -> None:
        """Raise ValueError if terms do not fit a run with, or without, a privileged sampler's rows."""
        rows = {name: term.rows for name, term in self.terms.items()}
        if not has_sampler:
            if name := next((name for name in rows if rows[name] == "privileged"), None):
                raise ValueError(f"objective.terms.{name}: rows = 'privileged', but there is no [rollout.privileged]")
            return
        self.check_other_samplers()
        if set(rows.values()) == {"student"}:
            raise ValueError("objective.terms: none learns from the rows of rollout.privileged; give one other `rows`")
        for name, term in self.terms.items():
            if isinstance(term, CrossEntropyTerm) and term.rows != "privileged":
                raise ValueError(
                    f"objective.terms.{name}: a cross_entropy on what the student itself sampled is noise; set rows = "
                    "'privileged'"
                )

    def scheduled_weights(self, step: int) -> dict[str, float]:
        """Return the weights that change with the steps, as they are at optimizer step `step`, from 0."""
        schedules = {name: term.weight for name, term in self.terms.items()}
        return {name: weight.at(step) for name, weight in schedules.items() if isinstance(weight, WeightSchedule)}

    def at(self, step: int) -> "ObjectiveConfig":
        """Return the objective of optimizer step `step`, from 0: all weights are numbers."""
        fixed = {name: replace(self.terms[name], weight=w) for name, w in self.scheduled_weights(step).items()}
        weights = self.token_weights.at(step)
        if not fixed and weights is self.token_weights:
            return self
        return replace(self, terms={**self.terms, **fixed}, token_weights=weights)

    @property
    def needs(self) -> Needs:
        terms, weights, sampled_candidates = self.terms.values(), self.token_weights, self.support == "samples"
        num_candidates = 0 if self.support in ("sampled", "full") else self.support_size - sampled_candidates
        of_student = sampled_candidates or self.support == "student_topk"
        of_entropy = ("teacher_entropy_above", "teacher_entropy_below")
        of_group = any(term.when in OF_GROUP for term in terms)
        step_means = any(isinstance(term, PolicyGradientTerm) and term.baseline == "batch_mean" for term in terms)
        return Needs(
            models=tuple(dict.fromkeys([TEACHER, *(model for term in terms for model in term.target)])),
            num_candidates=num_candidates,
            candidates_from=None if not num_candidates else "student" if of_student else "teacher",
            sampled_candidates=sampled_candidates,
            intersection=self.support == "intersection",
            hidden=self.support == "full" and any(not isinstance(term, RepresentationTerm) for term in terms),
            last_states=self._compared(reads_last=True),
            layer_states=self._compared(reads_last=False),
            teacher_entropy=weights.entropy in ("teacher", "both") or any(term.when in of_entropy for term in terms),
            first_pass=bool(weights.position_importance)
            or weights.entropy in ("student", "both")
            or any(term.needs_first_pass for term in terms),
            divides_by_deviation=next(iter(self._normalisations()), of_group or None),
            step_means=step_means,
            whole_step=step_means or weights.teacher_shares != "tokens",
        )

    @property
    def representation(self) -> RepresentationTerm | None:
        """Return a term that reads the layers that the models send; all that do read the same."""
        return next((term for term in self._of_states() if not term.reads_last), None)

    def _compared(self, reads_last: bool) -> tuple[str, ...]:
        terms = [term for term in self._of_states() if term.reads_last == reads_last]
        return tuple(dict.fromkeys(model for term in terms for model in term.target))

    def _of_states(self) -> list[RepresentationTerm]:
        return [term for term in self.terms.values() if isinstance(term, RepresentationTerm)]

    def _normalisations(self) -> set[bool]:
        return {term.divide_by_deviation for term in self.terms.values() if isinstance(term, TaskRewardTerm)}
