"""How much a context says, by a teacher whose answers are known."""

import asyncio
import math

import numpy as np
import pytest
import torch

from cluster.contracts.errors import ConfigError
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Bytes, Ints, make_generated
from cluster.models.lm_head import LmHead
from teacher_workers.actor import TeacherWorker
from teacher_workers.backends.base import check_signals
from tests.builders import make_config, make_trajectory
from tests.teacher_workers.hidden_states import HiddenStatesBackend

VOCABULARY = 40
HINT = 9  # which a prompt with a context begins with
WITH, WITHOUT = (0.5, 0.25), (0.1, 0.3)  # probabilities of the tokens 3 and 4; all others are alike


def other(own: tuple[float, float]) -> float:
    return (1 - sum(own)) / (VOCABULARY - 2)


class ScriptedEngine(HiddenStatesBackend):
    """Reads nothing but the first token."""

    def __init__(self) -> None:
        super().__init__(LmHead(torch.eye(VOCABULARY)))
        self.read: list[list[int]] = []

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        self.read.append(token_ids.tolist())
        own = WITH if token_ids[0] == HINT else WITHOUT
        probabilities = torch.full((VOCABULARY,), other(own))
        probabilities[3:5] = torch.tensor(own)
        return probabilities.log().expand(int(loss_mask.sum()), VOCABULARY), 0


def rows(count: int) -> list:
    contexts = [np.array([HINT, 8], np.int32) if row % 2 else np.empty(0, np.int32) for row in range(count)]
    return [
        make_trajectory(trajectory_id=row, scorer_prompts={"teacher": context}) for row, context in enumerate(contexts)
    ]


def measure(share: float, count: int = 4) -> tuple[dict[str, float], ScriptedEngine]:
    engine = ScriptedEngine()
    request = ScoreRequest("teacher", compared_rows=share)
    _, metrics = asyncio.run(TeacherWorker("teacher-main-0", engine).score(make_generated(rows(count)), request))
    return report(metrics), engine


def test_the_effect_is_the_divergence_over_the_most_likely_tokens_and_the_rest_of_rows_with_a_context() -> None:
    metrics, engine = measure(share=1.0)
    # All other tokens have the same ratio, whether they are listed or the rest.
    others = (1 - sum(WITH)) * math.log(other(WITH) / other(WITHOUT))
    expected = sum(own * math.log(own / without) for own, without in zip(WITH, WITHOUT, strict=True)) + others
    assert metrics["teacher/context_kl"] == pytest.approx(expected, rel=1e-4)
    assert engine.read[4:] == [[HINT, 8, 3, 4, 5]] * 2 + [[1, 2, 3, 4, 5]] * 2


def test_a_share_of_the_rows_is_scored_again_and_none_without_the_option() -> None:
    assert "teacher/context_kl" not in measure(share=0.0)[0]
    num_compared = (len(measure(share=0.25, count=400)[1].read) - 400) / 2
    assert 30 <= num_compared <= 70  # of 200 rows with a context


def test_a_backend_that_cannot_score_given_tokens_or_read_prompts_is_refused_before_anything_starts() -> None:
    pairs = "teachers.main.backend=examples.extend.teacher_backend:Bigrams"
    context = "teachers.main.context.template={{ prompt }} 1"
    with pytest.raises(ConfigError, match=r"^teachers.main: its backend '.*' reads the student's prompt alone; remove"):
        check_signals(make_config(pairs, context, "objective.preset=thinking-machines"))
    served = ("teachers.main.url=http://127.0.0.1:1/v1", "teachers.main.context.compared_rows=0.1")
    with pytest.raises(ConfigError, match=r"^teachers.main: context.compared_rows: .* cannot score tokens that"):
        check_signals(make_config(*served, context, "objective.preset=thinking-machines"))
