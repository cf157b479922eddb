"""The figures that the last lines of a run compare."""

from dataclasses import dataclass, field
from typing import Any

from cluster.evaluation import Evaluation


@dataclass
class History:
    """What a run has found so far; part of every checkpoint."""

    teacher_accuracy: dict[str, float | None] = field(default_factory=dict)
    first_accuracy: float | None = None
    last_accuracy: float | None = None
    first_kl: float | None = None  # on held-out prompts where there are any, else on the step's own
    last_kl: float | None = None
    first_sample: dict[str, Any] = field(default_factory=dict)
    last_sample: dict[str, Any] = field(default_factory=dict)

    def note_evaluation(self, found: Evaluation) -> None:
        """Keep what the first and the latest evaluation of the student found."""
        sample = found.samples[0] if found.samples else {}
        if not self.first_sample:
            self.first_accuracy, self.first_sample = found.accuracy, sample
        self.last_accuracy, self.last_sample = found.accuracy, sample
        if found.kl is not None:
            self.note_kl(found.kl)

    def note_kl(self, kl: float) -> None:
        """Keep the first and the latest KL per token."""
        self.first_kl = kl if self.first_kl is None else self.first_kl
        self.last_kl = kl
