"""Describes the terms of an objective: one section for each kind, what it needs and what it cannot have."""

import math
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from cluster.config.fields import (
    LARGEST_FLOAT,
    Count,
    Finite,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Text,
    WeightSchedule,
)
from cluster.contracts.import_path import is_import_path

Support = Literal["sampled", "samples", "topk", "student_topk", "intersection", "full"]
DIVERGENCE_NAMES = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl")
Truncation = Literal["generalized", "renormalized", "tail"]
LogRatioMap = Literal["identity", "clip", "soft_log", "tanh", "power", "proximal", "forward_kl", "jsd", "constant"]
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
    "reward_positive",
    "reward_not_positive",
    "advantage_positive",
    "advantage_not_positive",
    "outcome_agrees",
    "outcome_disagrees",
    "models_agree",
    "models_disagree",
]
Target = dict[str, Finite]  # model -> its coefficient in the log-linear target

TEACHER = "teacher"  # in a target: the teacher that the prompt is routed to
BASE = "base"  # in a target: what that teacher's `base` field names
INITIAL_STUDENT = "initial_student"  # in a target: the student before training
OUTSIDE_SUPPORT = "outside_support"  # a condition: the sampled token is none of the support's candidates
# Conditions that compare the trajectory's reward with its prompt's other samples.
OF_GROUP = ("advantage_positive", "advantage_not_positive", "outcome_agrees", "outcome_disagrees")
OF_MODELS = ("models_agree", "models_disagree")  # conditions on all models that the target names
OF_PREFIX = ("always", "teacher_entropy_above", "teacher_entropy_below")  # conditions that read no sampled token
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
    student, whether its gradient `is_zero_at_the_student`, when all models of its target are the student, whether it is
    `valid_for_other_samplers`: trajectories that another model, or the student with another prompt, wrote, and its
    `fault`: what it cannot have together under a support.
    """

    weight: Finite | WeightSchedule = 1.0
    when: Condition = "always"
    threshold: NonNegative = 0.8  # nats; of teacher_entropy_above and teacher_entropy_below
    # Whose rows the term learns from: everyone's, those that the student sampled from its own prompt, or those of
    # [rollout.privileged]
    rows: Literal["all", "student", "privileged"] = "all"


class PolicyGradientTerm(Term, tag_field="loss", tag="policy_gradient", frozen=True):
    """Takes the log-ratio target / student as the advantage of the tokens that the student sampled."""

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})
    over: Literal["sampled", "support"] = "sampled"  # the sampled token, or all candidates of the support
    normalize_weights: bool = False  # over = "support": the candidates' weights c(v) sum to 1
    log_ratio_map: LogRatioMap = "identity"
    bound: Positive = 5.0  # clip, tanh: the largest absolute value
    scale: Positive = 1.0  # tanh: the log-ratio at which it bends, in nats
    alpha: Positive = 1.0  # power: the exponent; proximal: the target's share; constant: minus the advantage
    student: Literal["current", "rollout", "none"] = "current"  # whose probability the log-ratio divides by
    # Over the support, of the prefix. kl: minus the divergence; support_mean: the mean advantage of its tokens.
    # batch_mean, response_mean: the mean advantage of the step's, or the response's, sampled tokens
    baseline: Literal["none", "kl", "support_mean", "batch_mean", "response_mean"] = "none"
    discount: Fraction = 0.0  # of later tokens' advantages in this token's
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def needs_first_pass(self) -> bool:
        # Later advantages, the mean of all, or a masked sequence.
        of_all = self.importance.kind == "sequence_mask" or self.baseline == "response_mean"
        return of_all or (self.discount > 0 and self.student == "current")

    @property
    def is_zero_at_the_student(self) -> bool:
        expected = 0.0 if self.student == "none" else 1.0
        return math.isclose(sum(self.target.values()), expected) and self.log_ratio_map != "constant"

    @property
    def valid_for_other_samplers(self) -> bool:
        return self.importance.kind != "none" and self.student != "rollout"

    def fault(self, support: Support) -> str | None:
        if not any(self.target.values()):
            return NO_TARGET
        if self.over == "support" and support not in ("samples", "student_topk"):
            return (
                f"over = 'support' needs tokens that the student chose, found objective.support = '{support}'; "
                "use samples or student_topk"
            )
        if fault := self._fault_of_baseline(support):
            return fault
        if self.log_ratio_map in ("power", "proximal", "forward_kl", "jsd") and self.student == "none":
            return f"log_ratio_map = '{self.log_ratio_map}' compares with the student, but student = 'none'"
        if self.normalize_weights and (self.over, support) != ("support", "student_topk"):
            return (
                "normalize_weights is for the sum over the student's candidates; use over = 'support' and student_topk"
            )
        if self.discount and self.over == "support":
            return "discount adds up advantages along the written text; it needs over = 'sampled'"
        return None

    def _fault_of_baseline(self, support: Support) -> str | None:
        if self.baseline == "none":
            return None
        name, is_mean = f"baseline = '{self.baseline}'", self.baseline != "kl"
        of_sampled = self.baseline in ("batch_mean", "response_mean")
        faults = {
            f"{name} lowers the variance of one draw; a sum over candidates has none; use over = 'sampled'": (
                self.over == "support"
            ),
            f"{name} needs support topk, student_topk, intersection or full, found '{support}'": (
                support in ("sampled", "samples") and not of_sampled
            ),
            f"{name} changes nothing in expectation only where all tokens of a prefix count, but when = '{self.when}' "
            "depends on the sampled token; leave one of them out": is_mean and self.when not in OF_PREFIX,
            f"{name} would leave nothing of log_ratio_map = 'constant'": is_mean and self.log_ratio_map == "constant",
            f"{name} is a mean under the current student; student = 'rollout' divides by another": (
                is_mean and self.student == "rollout"
            ),
            f"{name} is the mean over all tokens, of log-ratios alone; leave out when = '{self.when}' and discount": (
                of_sampled and (self.discount > 0 or self.when != "always")
            ),
        }
        return next((fault for fault, holds in faults.items() if holds), None)


class DivergenceTerm(Term, tag_field="loss", tag="divergence", frozen=True):
    """Differentiates a divergence between student and target over the support."""

    needs_first_pass: ClassVar[bool] = False
    valid_for_other_samplers: ClassVar[bool] = True  # the residual has a ratio

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})
    divergence: str = "reverse_kl"  # one of DIVERGENCE_NAMES, or one of your own as package.module:NAME
    truncation: Truncation = "tail"  # support "full" needs none and ignores it
    # Adds what a tail's bucket leaves out, from sampled tokens outside the support. Not written: of reverse_kl
    residual: bool | None = None
    # A token contributes at most so many nats to a position's divergence, and beyond pulls no more (OPSD's tau)
    entry_clip: Positive | None = None
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
        return wanted and self.truncation == "tail" and self.entry_clip is None

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
        if self.residual and self.entry_clip is not None:
            return "residual makes up for tokens outside the support in full, and entry_clip bounds each; leave one out"
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

    @property
    def valid_for_other_samplers(self) -> bool:
        return self.importance.kind != "none"

    def fault(self, _support: Support) -> str | None:
        return None  # a reward goes with every support


class RepresentationTerm(Term, tag_field="loss", tag="representation", frozen=True):
    """Draws hidden states of the student to those of the target, at the rows that predict the sampled tokens."""

    needs_first_pass: ClassVar[bool] = False
    valid_for_other_samplers: ClassVar[bool] = True

    target: Target = field(default_factory=lambda: {TEACHER: 1.0})  # of states: their coefficients sum to 1
    # Of the student, from 1; the last one after the final norm. A teacher of another depth has those at the same
    # relative depth.
    layers: Literal["last", "all"] | tuple[Count, ...] = "last"
    # By what student and target are divided, per layer and token: the target's root mean square; each one's own length.
    normalise: Literal["none", "rms", "l2"] = "none"
    bank: Text | None = None  # file of `preceptor fit-projection`; None: widths are equal, and whole states travel

    @property
    def is_zero_at_the_student(self) -> bool:
        return self.bank is None  # a bank's maps of student and teacher are two

    @property
    def reads_last(self) -> bool:
        """Return whether the target's last hidden states are all that it reads; else its layers are sent."""
        return self.layers == "last" and self.bank is None

    def fault(self, _support: Support) -> str | None:
        if not math.isclose(sum(self.target.values()), 1.0):
            return (
                f"the coefficients of target sum to {sum(self.target.values()):g}; a mixture of hidden states is one "
                "only if they sum to 1"
            )
        if self.when == OUTSIDE_SUPPORT:
            return "when = 'outside_support' is about the sampled token; hidden states are compared before it is known"
        if not self.layers:
            return "layers = [] names none; write 'last', 'all' or the student's layers from 1"
        return None


class GateConfig(Section, frozen=True):
    """Weighs each token by sigmoid(kappa (log p - gamma)), p the student's: little where it would never write it."""

    kappa: Positive = 2.0
    gamma: Finite = -3.5  # nats


class CrossEntropyTerm(Term, tag_field="loss", tag="cross_entropy", frozen=True):
    """Takes -log p of the written token: imitates the sampler, and is meant for rows that another one wrote."""

    target: ClassVar[Target] = {TEACHER: 1.0}  # of `when`
    needs_first_pass: ClassVar[bool] = False
    is_zero_at_the_student: ClassVar[bool] = False
    valid_for_other_samplers: ClassVar[bool] = True

    gate: GateConfig | None = None

    def fault(self, _support: Support) -> str | None:
        return None  # written tokens go with every support


AnyTerm = PolicyGradientTerm | DivergenceTerm | TaskRewardTerm | CrossEntropyTerm | RepresentationTerm
