"""Writes for `[rollout.privileged]`, and scores with the same engine: `[teachers.NAME] backend = "vllm-generate"`.

The engine of `backend = "vllm"` ends at the hidden states and cannot sample. This one samples as a rollout worker's
does, from the teacher's weights; of the scores, it has those of sampled tokens and of its own most likely ones.
"""

import asyncio
from collections.abc import Sequence
from itertools import count as counter

import numpy as np

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ConfigError
from cluster.contracts.requests import Completion, SamplingSettings
from cluster.contracts.trajectory import Ints
from cluster.models.model_checks import ModelFacts
from cluster.models.weight_files import fingerprint
from cluster.vllm.engine import EngineRole, build_engine
from teacher_workers.backends.listed_logprobs import Listed, ListedLogprobsBackend
from teacher_workers.backends.vllm import VllmBackend

FIRST = -1  # the priority of scores: rows wait for them, and a text is one of several


class GeneratingBackend(ListedLogprobsBackend):
    """Runs one teacher in a vLLM engine that samples."""

    can_generate = True
    scorer = "an engine that writes scores"

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Start the engine; raise ModelError if that fails."""
        from cluster.vllm.generation import MERGING, NO_LIMIT

        super().__init__(teacher)
        self._engine = build_engine(
            teacher.model,
            teacher.trust_remote_code,
            teacher.engine,
            EngineRole(
                max_model_len=max_model_len,
                logprobs_mode="processed_logprobs",
                max_logprobs=NO_LIMIT,
                prefix_caching=True,
                tokenizer=True,
                priorities=True,
                float32_head=teacher.engine.dtype != "float32",
                logits_processors=(MERGING,) * (len(teacher.stop_class) > 1),
            ),
        )
        self._requests = counter()

    @classmethod
    def sampling_fault(cls, teacher: TeacherConfig) -> str | None:
        return None

    @classmethod
    def check(cls, teacher: TeacherConfig, student: ModelFacts) -> ModelFacts:
        if teacher.slot is not None:
            raise ConfigError("backend = 'vllm-generate' writes while others score, and has no slot; remove slot")
        if teacher.is_refreshed:
            raise ConfigError("backend = 'vllm-generate' takes no weights; leave refresh = 'frozen'")
        return VllmBackend.check(teacher, student)

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        return fingerprint(teacher.model)

    @property
    def is_dead(self) -> bool:
        return bool(self._engine.errored)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion, without the tokens that the student lacks."""
        from cluster.vllm.generation import generate

        name, excluded = f"text-{next(self._requests)}", self._teacher.excluded_token_ids
        return await generate(self._engine, "teacher", name, prompt_ids, sampling, seed, priority, excluded=excluded)

    async def listed(self, rows: Sequence[tuple[Ints, Ints]], count: int, newest: int) -> tuple[Listed, int]:
        from cluster.vllm.generation import prompt_logprobs

        asked = (
            prompt_logprobs(self._engine, "teacher", f"score-{next(self._requests)}", ids, places, count, FIRST)
            for ids, places in rows
        )
        ids, logprobs = (np.concatenate(part) for part in zip(*await asyncio.gather(*asked), strict=True))
        return (ids, logprobs), 0
