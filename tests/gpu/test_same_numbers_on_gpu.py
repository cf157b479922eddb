"""Teachers and losses say on a GPU what they say on a CPU, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import from_wire
from cluster.models.lm_head import LmHead
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from learner.model.completion_head import CompletionHead, TeacherHeads
from learner.model.projection import LogitScaling
from tests.gpu.conftest import missing_packages
from tests.learner.model.test_completion_head import batch_of, make_hidden
from tests.learner.support import OBJECTIVES, ROUTE, VOCABULARY, random_heads

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

EMBEDDED = Path(__file__).parents[2] / "cluster" / "embedded"
TOLERANCE = 1e-4  # nats
WIDTH = 24


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_packages("ray", "vllm")), reason="needs ray and vllm")
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_a_teacher_scores_on_a_gpu_as_transformers_does_on_a_cpu(ray_cluster: None, model: str) -> None:
    # Here, so that the losses below can be compared where torch alone is.
    import ray

    from cluster.actors.cluster import PoolTimeouts
    from teacher_workers.pool import TeacherPool
    from tests.teacher_workers.test_scores_on_vllm import expected_rows, make_handle

    teacher = TeacherConfig(model=str(EMBEDDED / model), engine=EngineConfig(dtype="float32", gpu_memory_fraction=0.3))
    pool = TeacherPool(model, teacher, 128, [{"num_cpus": 1, "num_gpus": 1}], PoolTimeouts(500, 120))
    try:
        pool.wait_until_ready()
        handle = make_handle(0, num_rows=4, route=model)
        [scored] = pool.score_everywhere([handle], ScoreRequest("teacher", top_k=8))
        batch = from_wire(ray.get(scored[0].reference), "scored")
    finally:
        pool.shutdown()
    reference = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    for row, written, _, logprobs in expected_rows(reference, batch):
        own = ragged(batch, "teacher_logprobs")[row]
        assert np.abs(own - logprobs[np.arange(len(written)), written].numpy()).max() < TOLERANCE
        of_candidates = ragged(batch, "teacher_candidate_logprobs")[row].reshape(len(written), 8)
        best = logprobs.topk(8).values.numpy()
        assert np.abs(np.sort(of_candidates) - np.sort(best)).max() < TOLERANCE


def on(device: str, kind: str) -> tuple[Evaluation, Tensor, Tensor]:
    """Evaluate one of every kind of objective; return it with the gradients of hidden states and head."""
    objective = OBJECTIVES[kind]
    heads: TeacherHeads = random_heads(objective, {ROUTE: WIDTH}) if objective.needs.hidden else {}
    linear = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        linear.weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(1))
    head = CompletionHead(linear.to(device), LogitScaling())
    batch = batch_of(objective, heads or None)
    hidden = make_hidden(len(batch.predicting)).detach().to(device).requires_grad_()
    place = torch.device(device)
    kernels = choose_kernels(place, objective.needs.hidden)
    moved = {route: {name: moved_head(found, device) for name, found in by.items()} for route, by in heads.items()}
    result = Evaluation(*head(hidden, batch.to(place), Objective(objective, kernels), moved))
    result.loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return result, hidden.grad, head.weight.grad


def moved_head(head: LmHead, device: str) -> LmHead:
    return head.to(device)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_losses_and_gradients_on_a_gpu_are_those_on_a_cpu(kind: str) -> None:
    expected, expected_hidden, expected_weight = on("cpu", kind)
    found, found_hidden, found_weight = on("cuda", kind)
    for name in ("losses", "logprobs", "entropy", "candidate_mass"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found_hidden.cpu(), expected_hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_weight.cpu(), expected_weight, rtol=1e-4, atol=1e-4)
