"""Samples in the engines of a teacher, for `[rollout.privileged] sampler = "NAME"`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cluster.actors.named_actors import AGAIN, NamedActors
from cluster.contracts.errors import RolloutError
from cluster.contracts.requests import Completion, SamplingSettings

REPLACED = r"(@[0-9a-f]+)?"  # in the names of the workers of a teacher that took another's place


class TeacherEngine:
    """Asks the worker of a teacher that has the fewest texts to write."""

    def __init__(self, teacher: str, retry_seconds: float, policy_version: Callable[[], int]) -> None:
        """Take [teachers.NAME], how long a call waits for a worker, and the version of the student's weights.

        Every token is labelled with that version: the student of then selects the text and learns from it.
        """
        names = rf"teacher-{re.escape(teacher)}{REPLACED}-\d+{AGAIN}"
        self._teacher, self._retry_seconds = teacher, retry_seconds
        self._actors = NamedActors(names, retry_seconds, RolloutError)
        self._policy_version = policy_version

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion; raise RolloutError if no worker of the teacher does."""
        completion = await self._actors.call(
            lambda actor: actor.generate.remote(prompt_ids, sampling, seed, priority),
            load=1,
            otherwise=f"request {request_id}: no worker of teacher {self._teacher} wrote within teachers."
            f"{self._teacher}.retry_seconds = {self._retry_seconds:g}; see what `preceptor status` says of it",
        )
        versions = np.full(len(completion.token_ids), self._policy_version(), np.int32)
        return replace(completion, policy_versions=versions)
