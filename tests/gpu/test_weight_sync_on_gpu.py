"""New weights reach rollout engines from card to card, and the engines then say what the learner says."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from cluster.actors.cluster import RAY
from cluster.config.stages import Dtype, EngineConfig
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutPool
from tests.gpu.models import CALL_SECONDS, SHARE, rollout_pool, start_learner
from tests.rollout_workers.deployment import NUM_PROMPTS, rows_of
from tests.tiny_qwen3 import write_tiny_qwen3

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

SAME_IN_FLOAT32 = 1e-3  # nats; kernels of two libraries on a GPU
# Mean over the written tokens. vLLM 0.24 rounds its logits to bfloat16, which alone is 0.02 nats
# (benchmarks/gpu_parts/loop.py).
NATS_IN_BFLOAT16 = 0.03
OTHER_WEIGHTS = 0.05  # nats; what changed weights differ by at the very least


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("student"))


def gaps(pool: RolloutPool, learner: ActorHandle, dtype: Dtype, first_id: int) -> dict[int, np.ndarray]:
    """Return, by policy version, how far each written token's log-probability is from the learner's."""
    requests = [RolloutRequest(first_id + index, index % NUM_PROMPTS, index, first_id + index) for index in range(32)]
    found: dict[int, list[np.ndarray]] = {}
    for handle in pool.generate(requests, SamplingSettings(48, 1.0)):
        for row in rows_of(handle.reference):
            token_ids, written = row["token_ids"].tolist(), np.flatnonzero(row["loss_mask"])
            said = RAY.get(learner.logprobs.remote(token_ids, dtype), CALL_SECONDS, "the learner's log-probabilities")
            expected = said[written - 1, row["token_ids"][written]].numpy()
            found.setdefault(row["max_policy_version"], []).append(np.abs(expected - row["rollout_logprobs"]))
    return {version: np.concatenate(differences) for version, differences in found.items()}


def check_sync(pool: RolloutPool, learner: ActorHandle, dtype: Dtype, tolerance: float) -> None:
    """Publish twice, and compare before and after."""

    def publish(version: int) -> Any:
        ray.get(learner.change_weights.remote())
        before = gaps(pool, learner, dtype, first_id=1000 * version)
        assert min(found.mean() for found in before.values()) > OTHER_WEIGHTS
        return RAY.get(learner.publish.remote(pool.actors, version), CALL_SECONDS, "the weights to be published")

    for version in (1, 2):  # the second over the connection of the first
        report = publish(version)
        after = gaps(pool, learner, dtype, first_id=1000 * version + 500)
        assert set(after) == {version}
        assert after[version].mean() < tolerance
        assert report.num_bytes > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", SAME_IN_FLOAT32), ("bfloat16", NATS_IN_BFLOAT16)])
def test_an_engine_on_the_learners_card_reads_its_weights_there(
    ray_cluster: None, folder: Path, dtype: Dtype, tolerance: float
) -> None:
    engine = EngineConfig(dtype=dtype, gpu_memory_fraction=SHARE - 0.05, kv_cache_gib=0.5, enforce_eager=True)
    learner = start_learner(SHARE, folder, "ipc", dtype)
    with rollout_pool(folder, "ipc", engine, num_workers=2) as pool:  # two readers of one buffer
        check_sync(pool, learner, dtype, tolerance)
    ray.kill(learner)


@pytest.mark.gpu(gpus=3)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", SAME_IN_FLOAT32), ("bfloat16", NATS_IN_BFLOAT16)])
def test_one_broadcast_serves_all_engines(ray_cluster: None, folder: Path, dtype: Dtype, tolerance: float) -> None:
    learner = start_learner(1, folder, "nccl", dtype)
    with rollout_pool(folder, "nccl", EngineConfig(dtype=dtype), num_workers=2) as pool:
        check_sync(pool, learner, dtype, tolerance)
    ray.kill(learner)


@pytest.mark.gpu(gpus=3)
def test_a_broadcast_reaches_every_rank_of_an_engine_on_two_cards(ray_cluster: None, folder: Path) -> None:
    backend: Literal["nccl"] = "nccl"
    learner = start_learner(1, folder, backend, "float32", tensor_parallel=2)
    engine = EngineConfig(dtype="float32", tensor_parallel=2)
    with rollout_pool(folder, backend, engine, num_workers=1) as pool:
        check_sync(pool, learner, "float32", SAME_IN_FLOAT32)
    ray.kill(learner)


@pytest.mark.gpu(gpus=2)
def test_a_broadcast_reaches_one_engine(ray_cluster: None, folder: Path) -> None:
    learner = start_learner(1, folder, "nccl", "float32")
    with rollout_pool(folder, "nccl", EngineConfig(dtype="float32"), num_workers=1) as pool:
        check_sync(pool, learner, "float32", SAME_IN_FLOAT32)
    ray.kill(learner)
