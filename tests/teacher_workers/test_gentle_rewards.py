"""Rewards that a teacher multiplies by gentleness, and what a student learns from them."""

import asyncio
import itertools
import math

import msgspec
import numpy as np
import pytest
import torch

from cluster.config.context import GentlenessConfig
from cluster.config.objective import ObjectiveConfig
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from teacher_workers.actor import TeacherWorker
from tests.builders import make_trajectory
from tests.teacher_workers.test_teacher_worker import HALF_3_QUARTER_5, ScriptedEngine

TOP_1 = ScoreRequest("teacher", top_k=1)
CONFIG = GentlenessConfig(sharpness=5.0, strength=0.5)


def score(*rows: object, request: ScoreRequest = TOP_1) -> tuple[list[float | None], dict[str, float]]:
    worker = TeacherWorker("teacher-main-0", ScriptedEngine(HALF_3_QUARTER_5.log()), CONFIG)
    scored, metrics = asyncio.run(worker.score(make_generated(rows), request))  # type: ignore[arg-type]
    return scored["reward"].to_pylist(), report(metrics)


def test_a_reward_is_multiplied_by_how_near_the_text_is_to_the_teachers_favourites() -> None:
    rewards, metrics = score(
        make_trajectory(completion=[3, 3], reward=1.0),
        make_trajectory(completion=[5, 5], reward=0.5, trajectory_id=1),
        make_trajectory(completion=[5], reward=None, trajectory_id=2),
        make_trajectory(completion=[5], reward=0.0, trajectory_id=3),
    )
    # 5 has half the favourite's probability: d = log 2 everywhere, and G = exp(-log(2) / 2).
    gentle = math.sqrt(0.5)
    assert rewards == [1.0, pytest.approx(0.5 * gentle), None, 0.0]
    assert metrics["teacher/gentleness"] == pytest.approx((1 + 2 * gentle) / 3)


def test_all_rows_of_an_episode_are_one_text() -> None:
    fields = {"episode_id": 7, "reward": 1.0}
    first, last = make_trajectory(completion=[3], **fields), make_trajectory(completion=[5], turn=1, **fields)
    rewards, _ = score(first, last)
    expected = CONFIG.of(np.array([0.0, -math.log(2)]), np.zeros(2))
    assert rewards == [pytest.approx(expected)] * 2


def test_models_beside_the_teacher_and_evaluations_change_no_reward() -> None:
    assert score(make_trajectory(completion=[5], reward=1.0), request=ScoreRequest("teacher"))[0] == [1.0]
    assert score(make_trajectory(completion=[5], reward=1.0), request=ScoreRequest("base", top_k=1))[0] == [1.0]


def test_the_gradient_is_that_of_the_expected_gentle_reward() -> None:
    """All texts of two tokens over a vocabulary of 3: policy gradient against autograd of the sum p(y) R(y) G(y)."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    student.requires_grad_(True)
    texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
    logprobs = student.log_softmax(-1)[torch.arange(2), texts]  # [texts, 2]
    blind = teacher.log_softmax(-1)
    own, best = blind[torch.arange(2), texts].numpy(), blind.amax(-1).numpy()
    rewards = (texts.sum(1) % 2).double()
    gentle = torch.tensor([reward * CONFIG.of(one, best) for reward, one in zip(rewards.tolist(), own, strict=True)])
    probabilities = logprobs.sum(1).exp()
    [expected] = torch.autograd.grad((probabilities * gentle).sum(), student, retain_graph=True)

    objective = Objective(
        msgspec.convert(
            {"support": "sampled", "terms": {"reward": {"loss": "task_reward", "importance": {"kind": "none"}}}},
            ObjectiveConfig,
        )
    )
    nothing, count = torch.zeros(2 * len(texts)), 2 * len(texts)
    tokens = CompletionTokens(
        target_ids=texts.reshape(-1),
        rollout_logprobs=logprobs.detach().reshape(-1).float(),
        candidate_ids=torch.zeros(count, 0, dtype=torch.long),
        candidate_rollout_logprobs=torch.zeros(count, 0),
        scores={"teacher": {"logprobs": nothing}},
        trajectory=torch.arange(count) // 2,
        position=torch.arange(count) % 2,
        length=torch.full((count,), 2),
        uniform=nothing,
        task_advantage=gentle.float().repeat_interleave(2),
        reward=gentle.float().repeat_interleave(2),
        weight=probabilities.detach().float().repeat_interleave(2),  # how often each text comes
    )
    logits = student.detach().float().repeat(len(texts), 1)
    plan = objective.plan(tokens, None)
    result = objective.evaluate(logits, tokens, plan, {}, with_gradient=True)
    assert result.logits_gradient is not None
    torch.testing.assert_close(
        -result.logits_gradient.reshape(len(texts), 2, 3).sum(0).double(), expected, rtol=1e-5, atol=1e-6
    )
