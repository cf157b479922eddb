"""A learner on a card, and rollout pools beside it, for the tests of the weight sync."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.actor import ActorHandle
from torch.func import functional_call
from transformers import PreTrainedModel

from cluster.actors.cluster import RAY, PoolTimeouts
from cluster.config.sections import StudentConfig
from cluster.config.stages import Dtype, EngineConfig, WeightSyncConfig
from cluster.vllm.engine import SHARED_GPU_VARIABLE
from cluster.weight_sync.manifest import WeightSyncReport
from learner.weight_sync.gpu_sender import VllmSender, ipc_link, nccl_link
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.rollout_workers.deployment import FrozenEngine, make_prompts
from tests.tiny_qwen3 import CONTEXT_TOKENS, load

SMALL_BUCKETS = 1 << 14  # bytes: the tiny model's embedding is larger, and most buckets hold several parameters
START_SECONDS, CALL_SECONDS = 500.0, 120.0
SHARE = 0.3  # of a card that a rollout worker has beside the learner


class CardLearner:
    """A transformers model on a card, whose weights a VllmSender publishes."""

    def __init__(self, folder: Path, backend: Literal["nccl", "ipc"], dtype: Dtype, tensor_parallel: int = 1) -> None:
        self._model: Any = load(folder).to("cuda")
        engine: Any = FrozenEngine(self._model)
        sync = WeightSyncConfig(transport=backend, bucket_bytes=SMALL_BUCKETS)
        make_link = nccl_link(engine, tensor_parallel, SMALL_BUCKETS) if backend == "nccl" else ipc_link
        self._sender = VllmSender(engine, sync, dtype, CALL_SECONDS, make_link)

    @torch.no_grad()
    def change_weights(self) -> None:
        """Give every parameter other values."""
        for parameter in self._model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send the weights."""
        return self._sender.publish(workers, policy_version)

    @torch.no_grad()
    def logprobs(self, token_ids: list[int], dtype: Dtype) -> torch.Tensor:
        """Return [tokens - 1, vocabulary] on the CPU: row t is the distribution of token t + 1."""
        return logprobs_in(dtype, self._model, torch.tensor([token_ids], device="cuda")).cpu()


def logprobs_in(dtype: Dtype, model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Return [tokens - 1, vocabulary] of one sequence [1, tokens] with the weights cast, the model itself as it was.

    Casting the module would round its rotary frequencies too, which models that are loaded in bfloat16 keep in float32.
    """
    weights = {name: value.to(getattr(torch, dtype)) for name, value in model.named_parameters()}
    logits = functional_call(model, weights, (), {"input_ids": token_ids}).logits[0, :-1]
    return logits.float().log_softmax(-1)


def start_learner(
    num_gpus: float, folder: Path, backend: Literal["nccl", "ipc"], dtype: Dtype, tensor_parallel: int = 1
) -> ActorHandle:
    """Start a CardLearner in an actor and wait for it."""
    learner = ray.remote(num_gpus=num_gpus)(CardLearner).remote(folder, backend, dtype, tensor_parallel)
    RAY.get(learner.__ray_ready__.remote(), START_SECONDS, "the learner to start")
    return learner


@contextmanager
def rollout_pool(folder: Path, backend: str, engine: EngineConfig, num_workers: int) -> Iterator[RolloutPool]:
    """Start rollout workers on cards of their own, or with `ipc` each with a part of one."""
    settings = RolloutActorSettings(
        student=StudentConfig(str(folder)),
        engine=engine,
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport=backend,
    )
    option: Mapping[str, Any] = {"num_cpus": 1, "num_gpus": engine.tensor_parallel}
    if backend == "ipc":
        option = {
            "num_cpus": 1,
            "num_gpus": SHARE,
            "runtime_env": {"env_vars": {SHARED_GPU_VARIABLE: "1"}},
        }
    pool = RolloutPool(settings, [option] * num_workers, PoolTimeouts(START_SECONDS, CALL_SECONDS))
    try:
        pool.wait_until_ready()
        pool.set_prompts(make_prompts())
        yield pool
    finally:
        pool.shutdown()
