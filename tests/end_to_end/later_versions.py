"""A learner that begins anew beside workers which have seen its weights before."""

from typing import Any

from learner.group import LearnerGroup


class LaterVersions:
    """Passes calls on to a learner, and counts policy versions on from what the workers have seen."""

    def __init__(self, learner: LearnerGroup, added: int | None = None) -> None:
        """Add a number to every version; None: versions are 0, 1, 2, ... whatever the run says."""
        self._learner, self._added = learner, added
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def publish_weights(self, workers: Any, policy_version: int) -> Any:
        self._next += 1
        version = self._next - 1 if self._added is None else policy_version + self._added
        return self._learner.publish_weights(workers, version)
