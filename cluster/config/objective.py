"""What the student minimises: terms that are added up, the tokens they look at, and the models they compare with.

`docs/objective.md` gives the formula and says which published method is which configuration; `presets.py` names them.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, field

from cluster.config.fields import LARGEST_FLOAT, Finite, Fraction, Items, NonNegative, Positive, Section

Support = Literal["sampled", "samples", "topk", "student_topk", "intersection", "full"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"]
Truncation = Literal["generalized", "renormalized", "tail"]
LogRatioMap = Literal["identity", "clip", "soft_log", "tanh", "power", "proximal", "forward_kl", "jsd"]
ImportanceKind = Literal["none", "ratio", "truncated", "icepop", "sequence_mask", "ppo_clip"]
Condition = Literal[
    "always",
    "teacher_entropy_above",
    "teacher_entropy_below",
    "log_ratio_positive",
    "log_ratio_not_positive",
    "trusted",
    "untrusted",
]
Target = dict[str, Finite]  # model -> its coefficient in the log-linear target

TEACHER = "teacher"  # in a target: the teacher that the prompt is routed to
BASE = "base"  # in a target: what that teacher's `base` field names
INITIAL_STUDENT = "initial_student"  # in a target: the student before training


class ImportanceConfig(Section, frozen=True):
    """What becomes of the ratio student / rollout probability of a token."""

    kind: ImportanceKind = "ratio"
    low: NonNegative = 0.5  # icepop, sequence_mask, ppo_clip
    high: Positive = 2.0  # truncated, icepop, sequence_mask, ppo_clip
    # ppo_clip: bounds the loss of tokens with a bad advantage
    dual_clip: Annotated[float, Meta(gt=1, le=LARGEST_FLOAT)] | None = None

    def __post_init__(self) -> None:
        """Check that the bounds leave room; raises ValueError, which the reader turns into a ConfigError."""
        if self.kind in ("icepop", "sequence_mask", "ppo_clip") and self.low >= self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}; no ratio would be left between them")


class TokenWeightsConfig(Section, frozen=True):
    """How much each completion token counts; all given weights multiply. Token counts are never renormalised."""

    first_tokens: Items | None = None  # only so many at the start of each completion
    first_fraction: Annotated[float, Meta(gt=0, le=1)] | None = None  # only this part of each completion
    position_importance: NonNegative = 0.0  # extra weight of early tokens (IW-OPD's gamma)
    entropy: Literal["none", "student", "teacher", "both"] = "none"  # FiRe: unsure student, sure teacher


class Term(Section, frozen=True):
    """What all terms have: how much they count, and at which tokens."""

    weight: Finite = 1.0
    when: Condition = "always"
    threshold: NonNegative = 0.8  # nats; of teacher_entropy_above and teacher_entropy_below


class PolicyGradientTerm(Term, tag_field="loss", tag="policy_gradient", frozen=True):
    """The log-ratio target / student as the advantage of the tokens that the student drew."""

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})
    over: Literal["sampled", "support"] = "sampled"  # the written token, or all candidates of the support
    log_ratio_map: LogRatioMap = "identity"
    bound: Positive = 5.0  # clip, tanh: the largest absolute value
    scale: Positive = 1.0  # tanh: the log-ratio at which it bends, in nats
    alpha: Positive = 1.0  # power: the exponent; proximal: the target's share of the mixture
    student: Literal["current", "rollout", "none"] = "current"  # whose probability the log-ratio divides by
    baseline: Literal["none", "kl"] = "none"  # kl: minus the divergence of the prefix, over the support
    discount: Fraction = 0.0  # of later tokens' advantages in this token's
    importance: ImportanceConfig = ImportanceConfig()


class DivergenceTerm(Term, tag_field="loss", tag="divergence", frozen=True):
    """A divergence between student and target over the support, differentiated directly."""

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})
    divergence: Divergence = "reverse_kl"
    truncation: Truncation = "tail"  # support "full" needs none and ignores it
    beta: Fraction = 0.5  # jsd: 0 is forward KL, 1 is reverse KL
    skew: Fraction = 0.1  # skewed divergences: how far the second distribution is mixed with the first


class TaskRewardTerm(Term, tag_field="loss", tag="task_reward", frozen=True):
    """The verifier's reward, relative to the other samples of the same prompt, as the advantage of the whole text."""

    divide_by_deviation: bool = True  # GRPO; false: the mean is subtracted only
    importance: ImportanceConfig = ImportanceConfig()


AnyTerm = PolicyGradientTerm | DivergenceTerm | TaskRewardTerm


class ObjectiveConfig(Section, frozen=True):
    """The sum of the terms, per completion token."""

    preset: str | None = None  # a name of presets.py; whatever else is written here overrides it
    support: Support = "topk"  # the tokens per position on which models are compared
    support_size: Items = 16  # all supports but sampled and full; of `samples`, the written token is one
    terms: Annotated[dict[str, AnyTerm], Meta(min_length=1)] = field(default_factory=lambda: {"main": DivergenceTerm()})
    token_weights: TokenWeightsConfig = TokenWeightsConfig()

    def __post_init__(self) -> None:
        """Check each term against the support; raises ValueError, which the reader turns into a ConfigError."""
        if self.support == "samples" and self.support_size < 2:
            raise ValueError("objective.support = 'samples' needs support_size = 2 or more; one draw is 'sampled'")
        if len({term.divide_by_deviation for term in self.terms.values() if isinstance(term, TaskRewardTerm)}) > 1:
            raise ValueError("objective.terms: all task_reward terms must have the same divide_by_deviation")
        for name, term in self.terms.items():
            if fault := _fault(self.support, term):
                raise ValueError(f"objective.terms.{name}: {fault}")

    @property
    def num_candidates(self) -> int:
        """Return how many tokens per position are compared besides the written one, where they are listed."""
        if self.support in ("sampled", "full"):
            return 0
        return self.support_size - 1 if self.support == "samples" else self.support_size

    @property
    def candidates_from(self) -> Literal["student", "teacher"] | None:
        """Return whose tokens the candidates are; None where there are none."""
        if not self.num_candidates:
            return None
        return "student" if self.support in ("samples", "student_topk") else "teacher"

    @property
    def needs_teacher_entropy(self) -> bool:
        """Return whether the teacher's entropy at every position is used."""
        return self.token_weights.entropy in ("teacher", "both") or any(
            term.when in ("teacher_entropy_above", "teacher_entropy_below") for term in self.terms.values()
        )

    @property
    def models(self) -> list[str]:
        """Return the models that targets name, the routed teacher first."""
        named = dict.fromkeys([TEACHER, *(model for target in self._targets() for model in target)])
        return list(named)

    def _targets(self) -> Iterator[Target]:
        for term in self.terms.values():
            if not isinstance(term, TaskRewardTerm):
                yield term.target


def _fault(support: Support, term: AnyTerm) -> str | None:
    """Say what the term cannot have together; None if all is well."""
    if isinstance(term, TaskRewardTerm):
        return None
    if not any(term.target.values()):
        return "target names no model with a coefficient other than 0"
    if isinstance(term, PolicyGradientTerm):
        return _policy_gradient_fault(support, term)
    if support in ("sampled", "samples"):
        return (
            f"a divergence needs the probabilities of several given tokens, objective.support = '{support}' has draws; "
            "use loss = 'policy_gradient', or support topk, student_topk, intersection or full"
        )
    return None


def _policy_gradient_fault(support: Support, term: PolicyGradientTerm) -> str | None:
    if term.over == "support" and support not in ("samples", "student_topk"):
        return (
            f"over = 'support' needs tokens that the student chose, found objective.support = '{support}'; "
            "use samples or student_topk"
        )
    if term.baseline == "kl" and term.over == "support":
        return "baseline = 'kl' lowers the variance of one draw; a sum over candidates has none; use over = 'sampled'"
    if term.baseline == "kl" and support in ("sampled", "samples"):
        return f"baseline = 'kl' needs support topk, student_topk, intersection or full, found '{support}'"
    if term.log_ratio_map in ("power", "proximal", "forward_kl", "jsd") and term.student == "none":
        return f"log_ratio_map = '{term.log_ratio_map}' compares with the student, but student = 'none'"
    if term.discount and term.over == "support":
        return "discount adds up advantages along the written text; it needs over = 'sampled'"
    return None
