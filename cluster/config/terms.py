"""Describes the terms of an objective: one section for each kind, what it needs and what it cannot have."""

import math
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from cluster.config.fields import LARGEST_FLOAT, Finite, Fraction, NonNegative, Positive, Section
from cluster.contracts.import_path import is_import_path

Support = Literal["sampled", "samples", "topk", "student_topk", "intersection", "full"]
DIVERGENCE_NAMES = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl")
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
    "outside_support",
]
Target = dict[str, Finite]  # model -> its coefficient in the log-linear target

TEACHER = "teacher"  # in a target: the teacher that the prompt is routed to
BASE = "base"  # in a target: what that teacher's `base` field names
INITIAL_STUDENT = "initial_student"  # in a target: the student before training
OUTSIDE_SUPPORT = "outside_support"  # a condition: the sampled token is none of the support's candidates
NO_TARGET = "target names no model with a coefficient other than 0"


class ImportanceConfig(Section, frozen=True):
    """Says what becomes of the ratio student / rollout probability of a token."""

    kind: ImportanceKind = "ratio"
    low: NonNegative = 0.5  # icepop, sequence_mask, ppo_clip
    high: Positive = 2.0  # truncated, icepop, sequence_mask, ppo_clip
    # ppo_clip: bounds the loss of tokens with a bad advantage
    dual_clip: Annotated[float, Meta(gt=1, le=LARGEST_FLOAT)] | None = None

    def __post_init__(self) -> None:
        if self.kind in ("icepop", "sequence_mask", "ppo_clip") and self.low >= self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}; no ratio would be left between them")


class Term(Section, frozen=True):
    """Holds what all terms have: how much they count, and at which tokens.

    Besides, each kind of term says of itself whether it `needs_first_pass` of whole trajectories under the current
    student, whether its gradient `is_zero_at_the_student`, when all models of its target are the student, and its
    `fault`: what it cannot have together under a support.
    """

    weight: Finite = 1.0
    when: Condition = "always"
    threshold: NonNegative = 0.8  # nats; of teacher_entropy_above and teacher_entropy_below


class PolicyGradientTerm(Term, tag_field="loss", tag="policy_gradient", frozen=True):
    """Takes the log-ratio target / student as the advantage of the tokens that the student sampled."""

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})
    over: Literal["sampled", "support"] = "sampled"  # the sampled token, or all candidates of the support
    normalize_weights: bool = False  # over = "support": the candidates' weights c(v) sum to 1
    log_ratio_map: LogRatioMap = "identity"
    bound: Positive = 5.0  # clip, tanh: the largest absolute value
    scale: Positive = 1.0  # tanh: the log-ratio at which it bends, in nats
    alpha: Positive = 1.0  # power: the exponent; proximal: the target's share of the mixture
    student: Literal["current", "rollout", "none"] = "current"  # whose probability the log-ratio divides by
    baseline: Literal["none", "kl"] = "none"  # kl: minus the divergence of the prefix, over the support
    discount: Fraction = 0.0  # of later tokens' advantages in this token's
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def needs_first_pass(self) -> bool:
        # Later advantages, or a masked sequence.
        return self.importance.kind == "sequence_mask" or (self.discount > 0 and self.student == "current")

    @property
    def is_zero_at_the_student(self) -> bool:
        return math.isclose(sum(self.target.values()), 0.0 if self.student == "none" else 1.0)

    def fault(self, support: Support) -> str | None:
        if not any(self.target.values()):
            return NO_TARGET
        if self.over == "support" and support not in ("samples", "student_topk"):
            return (
                f"over = 'support' needs tokens that the student chose, found objective.support = '{support}'; "
                "use samples or student_topk"
            )
        if self.baseline == "kl" and self.over == "support":
            return (
                "baseline = 'kl' lowers the variance of one draw; a sum over candidates has none; use over = 'sampled'"
            )
        if self.baseline == "kl" and support in ("sampled", "samples"):
            return f"baseline = 'kl' needs support topk, student_topk, intersection or full, found '{support}'"
        if self.log_ratio_map in ("power", "proximal", "forward_kl", "jsd") and self.student == "none":
            return f"log_ratio_map = '{self.log_ratio_map}' compares with the student, but student = 'none'"
        if self.normalize_weights and (self.over, support) != ("support", "student_topk"):
            return (
                "normalize_weights is for the sum over the student's candidates; use over = 'support' and student_topk"
            )
        if self.discount and self.over == "support":
            return "discount adds up advantages along the written text; it needs over = 'sampled'"
        return None


class DivergenceTerm(Term, tag_field="loss", tag="divergence", frozen=True):
    """Differentiates a divergence between student and target over the support."""

    needs_first_pass: ClassVar[bool] = False

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})
    divergence: str = "reverse_kl"  # one of DIVERGENCE_NAMES, or one of your own as package.module:NAME
    truncation: Truncation = "tail"  # support "full" needs none and ignores it
    # Adds what a tail's bucket leaves out, from sampled tokens outside the support. Not written: of reverse_kl
    residual: bool | None = None
    beta: Fraction = 0.5  # jsd: 0 is forward KL, 1 is reverse KL
    skew: Fraction = 0.1  # skewed divergences: how far the second distribution is mixed with the first
    parameter: Finite = 0.0  # of a divergence of your own

    @property
    def is_zero_at_the_student(self) -> bool:
        return math.isclose(sum(self.target.values()), 1.0)

    @property
    def has_residual(self) -> bool:
        """Return whether sampled tokens correct the tail."""
        wanted = self.divergence == "reverse_kl" if self.residual is None else self.residual
        return wanted and self.truncation == "tail"

    def fault(self, support: Support) -> str | None:
        if not any(self.target.values()):
            return NO_TARGET
        if self.divergence not in DIVERGENCE_NAMES and not is_import_path(self.divergence):
            return (
                f"divergence = '{self.divergence}' is not known; there are {', '.join(DIVERGENCE_NAMES)}, or give one "
                "of your own as package.module:NAME"
            )
        if support in ("sampled", "samples"):
            return (
                f"a divergence needs the probabilities of several given tokens, objective.support = '{support}' has "
                "draws; use loss = 'policy_gradient', or support topk, student_topk, intersection or full"
            )
        if self.residual and self.truncation != "tail":
            return f"residual corrects the bucket of truncation = 'tail', found truncation = '{self.truncation}'"
        forward = {"forward_kl": 0.0, "jsd": self.beta, "skewed_forward_kl": self.skew}
        if self.residual and forward.get(self.divergence) == 0:
            return "residual weighs a token of the forward KL by target / student, which has no bound; leave it out"
        return None


class TaskRewardTerm(Term, tag_field="loss", tag="task_reward", frozen=True):
    """Takes the verifier's reward, relative to the prompt's other samples, as the advantage of the whole text."""

    target: ClassVar[Target] = {TEACHER: 1.0}  # of `when`
    is_zero_at_the_student: ClassVar[bool] = False

    divide_by_deviation: bool = True  # GRPO; false: the mean is subtracted only
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def needs_first_pass(self) -> bool:
        return self.importance.kind == "sequence_mask"

    def fault(self, _support: Support) -> str | None:
        return None  # a reward goes with every support


AnyTerm = PolicyGradientTerm | DivergenceTerm | TaskRewardTerm
