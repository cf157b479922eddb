"""A running rollout pool beside a transformers model with the same weights, and the prompts that both are asked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import PreTrainedModel

from cluster.actors.cluster import RAY, PoolTimeouts
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import from_wire
from cluster.weight_sync.manifest import checksum
from learner.model.student import Student
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from rollout_workers.prompts import PromptSet
from tests.tiny_qwen3 import CONTEXT_TOKENS, load

NUM_PROMPTS = 8
LONG_PROMPT_TOKENS = 300  # more than two of vLLM's cache blocks, which hold 128 tokens on CPU
LONG_PROMPT = NUM_PROMPTS  # its prompt id
MAX_TRIES = 5  # to update weights while rows are under way, each with twice the rows of the one before


@dataclass
class RolloutDeployment:
    """A running pool, and a transformers model that is kept at the pool's weights."""

    pool: RolloutPool
    prompts: PromptSet
    student: PreTrainedModel
    policy_version: int = 0
    next_id: int = field(default=0)
    num_changes: int = field(default=0)  # of the reference's weights
    first_weights: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.first_weights = [parameter.detach().clone() for parameter in self.student.parameters()]

    def requests(self, prompt_ids: Sequence[int], seed: int = 0) -> list[RolloutRequest]:
        """Ask for one completion per prompt id; seeds count up from `seed`."""
        self.next_id += len(prompt_ids)
        first = self.next_id - len(prompt_ids)
        return [
            RolloutRequest(first + index, prompt_id, index, seed + index) for index, prompt_id in enumerate(prompt_ids)
        ]

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingSettings) -> list[dict[str, Any]]:
        """Return the rows, in the order of the requests."""
        handles = self.pool.generate(requests, sampling)
        rows = [row for handle in handles for row in rows_of(handle.reference)]
        return sorted(rows, key=lambda row: row["trajectory_id"])

    def generate_across_updates(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingSettings,
        updates: Sequence[int] = (1,),
        is_wanted: Callable[[dict[str, Any]], bool] = lambda row: True,
    ) -> tuple[dict[int, dict[str, torch.Tensor]], list[dict[str, Any]]]:
        """Publish new weights while rows are written, at versions that lie `updates` after the first weights' version.

        Returns the weights of each version, and all rows, of which one that `is_wanted` has tokens of every version. A
        busy machine may have written the rows before the weights arrive; it is asked again, for more rows.
        """
        for attempt in range(MAX_TRIES):
            self.restore_weights()
            first = self.policy_version
            stream = self.pool.generate(self.requests([*prompt_ids] * 2**attempt), sampling)
            handles = [next(stream)]  # the rest is under way
            weights = {first: self.copy_weights()}
            for update in updates:
                self.change_weights()
                self.publish(first + update)
                weights[first + update] = self.copy_weights()
                handles.extend(islice(stream, 1))
            rows = [row for handle in [*handles, *stream] for row in rows_of(handle.reference)]
            assert len(rows) == len(prompt_ids) * 2**attempt
            if any(set(version_of_each_token(row)) == set(weights) and is_wanted(row) for row in rows):
                return weights, rows
        raise AssertionError(f"all rows were written before the weights of {len(updates)} updates had arrived")

    def copy_weights(self) -> dict[str, torch.Tensor]:
        """Copy the reference's."""
        return {name: value.clone() for name, value in self.student.state_dict().items()}

    def change_weights(self) -> None:
        """Give the reference other weights, as far from the first as any; `publish` sends them."""
        self.num_changes += 1
        random = torch.Generator().manual_seed(self.num_changes)
        with torch.no_grad():
            for parameter, first in zip(self.student.parameters(), self.first_weights, strict=True):
                parameter.copy_(first + torch.randn(parameter.shape, generator=random) * 0.1)

    def restore_weights(self) -> None:
        """Give the reference and the actors the first weights again, whatever other tests have left."""
        with torch.no_grad():
            for parameter, first in zip(self.student.parameters(), self.first_weights, strict=True):
                parameter.copy_(first)
        self.publish(self.policy_version + 1)

    def change_some_weights(self, every: int) -> None:
        """Give the reference another value at one of `every` places of each parameter, if it has as many."""
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.view(-1)[every - 1 :: every] *= 1.5

    def publish(
        self,
        policy_version: int,
        leave_out: Sequence[str] = (),
        damage: bool = False,
        base_version: int | None = None,
        is_given_up: bool = False,
    ) -> str:
        """Send the reference's weights in two buckets; returns the checksum, equal on all actors, and as expected.

        An update that `is_given_up` is left open after the first bucket.
        """
        timeouts: dict[str, Any] = {"timeout_seconds": 60, "waiting_for": "the test's weight sync"}
        RAY.call_all(self.pool.actors, "start_weight_update", **timeouts)
        named = [(name, value) for name, value in self.student.named_parameters() if name not in leave_out]
        buffers = []
        for part in (named[:5], named[5:]):  # splits the first layer's packed q, k and v
            arrays = [value.detach().numpy() for _, value in part]
            buffers.append(pa.py_buffer(np.concatenate([array.reshape(-1) for array in arrays])))
            update_info = {
                "names": [name for name, _ in part],
                "dtypes": ["float32"] * len(part),
                "shapes": [list(array.shape) for array in arrays],
                "checksum": "0" * 32 if damage else checksum(buffers),
                "reference": [ray.put(buffers[-1])],
                "base_version": base_version,
            }
            RAY.call_all(self.pool.actors, "update_weights", update_info, **timeouts)
            if is_given_up:
                return ""
        received = RAY.call_all(self.pool.actors, "finish_weight_update", policy_version, **timeouts)
        assert set(received) == {checksum(buffers)}
        self.policy_version = policy_version
        return str(received[0])


class FrozenEngine:
    """What a sender needs of a TrainEngine, over one transformers model."""

    rank = 0

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.student = Student(causal_lm)

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Give whole parameters."""
        yield {name: self.student.causal_lm.get_parameter(name).detach() for name in names}


@contextmanager
def deployed(
    folder: Path, name: str = "rollout", transport: str | None = "object_store", num_workers: int = 1, **settings: Any
) -> Iterator[RolloutDeployment]:
    """Start real rollout actors of a tiny student; `settings` are further ones of `RolloutActorSettings`."""
    actors = RolloutActorSettings(
        student=StudentConfig(str(folder)),
        engine=EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1),
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport=transport,
        **settings,
    )
    pool = RolloutPool(actors, [{"num_cpus": 1}] * num_workers, PoolTimeouts(start_seconds=500, call_seconds=120), name)
    try:
        pool.wait_until_ready()
        prompts = make_prompts()
        pool.set_prompts(prompts)
        yield RolloutDeployment(pool, prompts, load(folder))
    finally:
        pool.shutdown()


def rows_of(reference: Any) -> list[dict[str, Any]]:
    """Return a batch's rows, the list columns as numpy."""
    batch = from_wire(ray.get(reference))
    names = [field.name for field in batch.schema if pa.types.is_list(field.type)]
    columns = {name: ragged(batch, name) for name in names}
    return [
        {**row, **{name: column[index] for name, column in columns.items()}}
        for index, row in enumerate(batch.to_pylist())
    ]


def version_of_each_token(row: dict[str, Any]) -> np.ndarray:
    """Return [completion_tokens]: which policy version wrote each; a request that waited begins under a later one."""
    changes = np.searchsorted(row["version_changes"], np.arange(len(row["rollout_logprobs"])), side="right")
    return np.asarray(row["min_policy_version"] + changes)


def make_prompts() -> PromptSet:
    """Build short prompts for two teachers in turn, and one long prompt; those of the first teacher have an answer."""
    token_ids = [list(range(10 + index, 20 + 2 * index)) for index in range(NUM_PROMPTS)]
    token_ids.append([4 + index * 7 % 100 for index in range(LONG_PROMPT_TOKENS)])
    columns = {
        "token_ids": token_ids,
        "text": ["" for _ in token_ids],
        "answer": ["w50" if index % 2 == 0 else None for index in range(len(token_ids))],
        "domain": ["words" for _ in token_ids],
        "teacher": ["even" if index % 2 == 0 else "odd" for index in range(len(token_ids))],
        "columns": [None for _ in token_ids],
    }
    return PromptSet.of_columns(columns)
