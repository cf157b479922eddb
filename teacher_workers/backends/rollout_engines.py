"""Scores in the rollout pool's engines: `[teachers.NAME] from = "student", refresh = "live", backend = "rollout"`.

Such a teacher has the weights that the student writes with, so it needs no engine, no GPU and no weights of its own.
Its workers send rows to the rollout actors, whose engines read them beside what they write.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.actors.named_actors import AGAIN, NamedActors
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ScoreError
from cluster.contracts.trajectory import Ints
from cluster.models.weight_files import fingerprint
from teacher_workers.backends.listed_logprobs import Listed, ListedLogprobsBackend

if TYPE_CHECKING:
    from cluster.models.model_checks import ModelFacts

ROLLOUT_ACTORS = rf"rollout-\d+{AGAIN}"  # as the rollout pool calls them


class RolloutEnginesBackend(ListedLogprobsBackend):
    """Sends each batch to the rollout actor that has the fewest of its tokens to score."""

    scorer = "the rollout engines score"

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Prepare to ask; actors are looked for when they are needed."""
        super().__init__(teacher)
        self._actors = NamedActors(ROLLOUT_ACTORS, teacher.retry_seconds, ScoreError)

    @classmethod
    def check(cls, teacher: TeacherConfig, student: "ModelFacts") -> "ModelFacts":
        return student

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        return fingerprint(teacher.model)

    async def listed(self, rows: Sequence[tuple[Ints, Ints]], count: int, newest: int) -> tuple[Listed, int]:
        """Ask until an actor with weights of version `newest` or later answers."""
        ids, logprobs, version = await self._actors.call(
            lambda actor: actor.prompt_logprobs.remote(rows, count, newest),
            load=sum(len(ids) for ids, _ in rows),
            otherwise=f"no rollout engine scored with weights of version {newest} or later within "
            f"teachers.NAME.retry_seconds = {self._teacher.retry_seconds:g}; see what `preceptor status` says of the "
            "rollout pool",
            is_answer=lambda answer: answer[2] >= newest,
        )
        return (ids, logprobs), version
