"""The table of a run's figures: what each is called in Ray's metrics, where it stands in metrics.jsonl, what it says.

Ray's metrics, the Grafana dashboard and docs/metrics.md are made from it. Ray puts `ray_` before every name.
"""

from dataclasses import dataclass
from typing import Literal

POOL = "{pool}"  # in a source: stands for each pool's name, which becomes the tag `pool`


@dataclass(frozen=True)
class Figure:
    """One metric; those of sources with `{pool}` have the tag `pool` besides `run`."""

    metric: str
    source: str  # its name in metrics.jsonl, or what is counted
    says: str
    kind: Literal["gauge", "counter", "histogram"] = "gauge"

    @property
    def is_of_pools(self) -> bool:
        """Return whether every pool has one."""
        return POOL in self.source


@dataclass(frozen=True)
class Panel:
    """Figures of one unit that are looked at together."""

    row: str
    title: str
    unit: str  # as Grafana calls it
    figures: tuple[Figure, ...]


# What two figures count that is no figure of metrics.jsonl itself.
COMPLETION_LENGTHS = "completion tokens of every trajectory"
EVERY_STEP = "every step"

PANELS: tuple[Panel, ...] = (
    Panel(
        "Progress",
        "KL to the teacher per token",
        "none",
        (
            Figure(
                "preceptor_kl",
                "train/kl",
                "KL of the student from its teachers per token, on the step's own trajectories, nats",
            ),
            Figure("preceptor_held_out_kl", "held_out/kl", "the same on held-out prompts, nats"),
        ),
    ),
    Panel(
        "Progress",
        "Accuracy",
        "percentunit",
        (
            Figure("preceptor_reward", "rollout/reward", "mean reward of the step's trajectories"),
            Figure("preceptor_held_out_accuracy", "held_out/accuracy", "share of held-out prompts answered right"),
        ),
    ),
    Panel(
        "Progress",
        "Steps",
        "none",
        (Figure("preceptor_step", "step", "optimizer steps done"),),
    ),
    Panel(
        "Progress",
        "Steps per second",
        "ops",
        (Figure("preceptor_steps", EVERY_STEP, "optimizer steps since the run started or was resumed", "counter"),),
    ),
    Panel(
        "Throughput",
        "Tokens per second by stage",
        "none",
        (
            Figure("preceptor_step_tokens_per_second", "step/tokens_per_second", "completion tokens over a whole step"),
            Figure(
                "preceptor_generate_tokens_per_second",
                "generate/tokens_per_second",
                "completion tokens over the time from admission to the last completion",
            ),
            Figure(
                "preceptor_score_tokens_per_second",
                "score/tokens_per_second",
                "completion tokens over the time from admission to the last score",
            ),
            Figure(
                "preceptor_learn_tokens_per_second",
                "learn/tokens_per_second",
                "prompt and completion tokens over what a rank computed",
            ),
        ),
    ),
    Panel(
        "Throughput",
        "Tokens per second by pool",
        "none",
        (
            Figure(
                "preceptor_pool_tokens_per_second",
                "pool/{pool}/tokens_per_second",
                "tokens that came back since the step before, evaluations included: written ones of rollout workers, "
                "prompt and completion of teachers",
            ),
        ),
    ),
    Panel(
        "Throughput",
        "Completion tokens written",
        "none",
        (Figure("preceptor_completion_tokens", "completion_tokens", "completion tokens learned from", "counter"),),
    ),
    Panel(
        "Throughput",
        "Teacher bytes per token",
        "bytes",
        (
            Figure(
                "preceptor_score_bytes_per_token",
                "teacher/bytes_per_token",
                "bytes that scoring adds to a trajectory, per completion token",
            ),
        ),
    ),
    Panel(
        "Throughput",
        "Weight sync bytes",
        "bytes",
        (Figure("preceptor_sync_bytes", "sync/bytes", "bytes of one weight sync"),),
    ),
    Panel(
        "Where the time goes",
        "Seconds of a step",
        "s",
        (
            Figure("preceptor_step_seconds", "step/seconds", "the whole step, evaluation and checkpoint aside"),
            Figure("preceptor_wait_generate_seconds", "generate/seconds", "from admission to the last completion"),
            Figure("preceptor_wait_score_seconds", "score/seconds", "from there to the last score"),
            Figure("preceptor_wait_learn_seconds", "learn/wait_seconds", "from there to the weight sync"),
            Figure("preceptor_sync_seconds", "sync/seconds", "weight sync"),
            Figure("preceptor_learn_seconds", "learn/seconds", "what a rank computed, beside the other stages"),
        ),
    ),
    Panel(
        "Where the time goes",
        "Busy share by pool",
        "percentunit",
        (
            Figure(
                "preceptor_pool_busy_share",
                "pool/{pool}/busy_share",
                "share of the time since the step before in which a worker had work, mean over the pool's workers",
            ),
        ),
    ),
    Panel(
        "Where the time goes",
        "Idle share by pool",
        "percentunit",
        (Figure("preceptor_pool_idle_share", "pool/{pool}/idle_share", "1 minus the busy share"),),
    ),
    Panel(
        "Where the time goes",
        "Queues",
        "none",
        (
            Figure("preceptor_queued_completions", "generate/queued_completions", "completions owed, mean over a step"),
            Figure("preceptor_queued_batches", "score/queued_batches", "batches at a teacher, mean over a step"),
        ),
    ),
    Panel(
        "Where the time goes",
        "Switches between the teachers of slots",
        "none",
        (
            Figure("preceptor_slot_switches", "slot/switches", "engines woken in a step, over all slots"),
            Figure("preceptor_slot_switch_seconds", "slot/switch_seconds", "what that took, seconds"),
        ),
    ),
    Panel(
        "Where the time goes",
        "Staleness",
        "none",
        (
            Figure("preceptor_staleness_mean", "staleness/mean", "updates between a trajectory and its use, mean"),
            Figure("preceptor_staleness_max", "staleness/max", "the same, largest"),
        ),
    ),
    Panel(
        "Where the time goes",
        "Seconds of a checkpoint",
        "s",
        (
            Figure("preceptor_checkpoint_held_seconds", "checkpoint/held_seconds", "in which training stood still"),
            Figure("preceptor_checkpoint_writing_seconds", "checkpoint/writing_seconds", "of writing beside training"),
        ),
    ),
    Panel(
        "Training",
        "Loss and entropy",
        "none",
        (
            Figure("preceptor_loss", "train/loss", "mean loss per token"),
            Figure("preceptor_entropy", "train/entropy", "entropy of the student per token, nats"),
        ),
    ),
    Panel(
        "Training",
        "Overlap of student and teacher",
        "percentunit",
        (
            Figure(
                "preceptor_overlap_ratio",
                "train/student_candidate_mass",
                "probability that the student gives to the candidates, most often the teacher's top-k",
            ),
            Figure(
                "preceptor_topk_mass",
                "train/teacher_candidate_mass",
                "probability that the teacher gives to the candidates",
            ),
        ),
    ),
    Panel(
        "Training",
        "Importance ratio",
        "none",
        (
            Figure("preceptor_importance_p99", "train/importance_p99", "learner over sampler, 99th percentile"),
            Figure("preceptor_importance_max", "train/importance_max", "learner over sampler, largest"),
        ),
    ),
    Panel(
        "Training",
        "Sampler against learner",
        "none",
        (
            Figure(
                "preceptor_sampler_learner_gap",
                "train/sampler_learner_gap",
                "absolute difference of their log-probabilities per written token, mean, nats",
            ),
        ),
    ),
    Panel(
        "Training",
        "Gradient norm",
        "none",
        (Figure("preceptor_gradient_norm", "train/gradient_norm", "before clipping"),),
    ),
    Panel(
        "Training",
        "Learning rate",
        "sci",
        (Figure("preceptor_learning_rate", "train/learning_rate", "of the step"),),
    ),
    Panel(
        "Completions",
        "Length",
        "none",
        (
            Figure("preceptor_completion_length", "rollout/completion_length", "tokens of a completion, mean"),
            Figure("preceptor_completion_length_max", "rollout/completion_length_max", "tokens, longest"),
        ),
    ),
    Panel(
        "Completions",
        "Length, distribution",
        "none",
        (Figure("preceptor_completion_lengths", COMPLETION_LENGTHS, "tokens of a completion", "histogram"),),
    ),
    Panel(
        "Completions",
        "Ends other than by end of text",
        "percentunit",
        (
            Figure("preceptor_truncated_ratio", "rollout/truncated_ratio", "share cut off at the longest length"),
            Figure("preceptor_repetition_ratio", "rollout/repetition_ratio", "share ended because of repetition"),
        ),
    ),
    Panel(
        "Workers",
        "Workers that serve",
        "none",
        (
            Figure("preceptor_pool_serving", "pool/{pool}/serving", "workers that take work"),
            Figure("preceptor_pool_wanted", "pool/{pool}/wanted", "workers that do when none is on its way"),
        ),
    ),
    Panel(
        "Workers",
        "Moves between pools",
        "none",
        (Figure("preceptor_balance_moves", "balance/moves", "times that the balancer moved workers since the start"),),
    ),
    Panel(
        "Workers",
        "Restarts",
        "none",
        (Figure("preceptor_pool_restarts", "pool/{pool}/restarts", "workers started again since the run began"),),
    ),
)


def figures() -> list[Figure]:
    """Return all figures in the table's order."""
    return [figure for panel in PANELS for figure in panel.figures]
