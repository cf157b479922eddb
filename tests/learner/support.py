"""Hand-built trajectories, what random teachers or the student say of them, and a stand-in for a rollout actor."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import expand_preset
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Max, Metric
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import (
    GeneratedTrajectory,
    add_scores,
    generated_schema,
    make_generated,
    ragged,
)
from cluster.contracts.wire import to_wire
from cluster.models.lm_head import LmHead
from cluster.weight_sync.manifest import checksum
from learner.batching.arrivals import group_advantages
from learner.batching.micro_batch import MicroBatch
from learner.engines.base import TrainEngine
from learner.loss.objective import Objective
from learner.model.completion_head import TeacherHeads
from learner.train_step import accumulate

VOCABULARY = 112
LENGTHS = ((3, 9), (5, 30), (2, 1), (8, 20), (4, 44), (6, 7), (1, 12))  # (prompt, completion) tokens
ROUTE = "only"
# The configuration of models of several families, small enough to build for every test.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def objective_of(preset: str, **written: Any) -> ObjectiveConfig:
    """Return a published objective, with fields that change it."""
    return msgspec.convert(expand_preset({"preset": preset, **written}), ObjectiveConfig)


# One of each kind of support; all candidates of the tiny vocabulary that they need are in the columns of `make_scored`.
OBJECTIVES = {
    "sampled": objective_of("thinking-machines"),
    "topk": objective_of("tail-topk", support_size=8),
    "samples": objective_of("async-opd", support_size=8),
    "student_topk": objective_of("rethinking", support_size=8),
    "full": objective_of("gkd"),
    "first_pass": objective_of("minillm"),
    "reward": objective_of("opd-grpo"),
    "states": objective_of(
        "thinking-machines",
        terms={
            "last": {"loss": "representation", "weight": 2.0, "normalise": "l2"},
            "layers": {"loss": "representation", "layers": [1, 2], "weight": 0.1, "normalise": "rms"},
        },
    ),
}


def make_scored(
    objective: ObjectiveConfig,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    route: str = ROUTE,
    heads: TeacherHeads | None = None,
    first_id: int = 0,
) -> pa.RecordBatch:
    """Build trajectories with all columns that an objective needs, scored by random models.

    Where heads are given, hidden states are random and the scores are what the heads say of them.
    """
    random = np.random.default_rng(first_id)
    rows = [_random_row(random, objective, first_id + index, route, *length) for index, length in enumerate(lengths)]
    batches = []
    for row in rows:
        batch = make_generated([row])
        for model in objective.needs.models:
            head = None if heads is None else heads[route][model]
            completion = len(row.rollout_logprobs)
            width = VOCABULARY if head is None else head.weight.shape[1]
            hidden = torch.from_numpy(random.normal(size=(completion, width)).astype(np.float32) * 2)
            logits = hidden if head is None else head.logits(hidden)
            last = hidden[:, : SMALL["hidden_size"]] if objective.needs.last_states else hidden
            layers = torch.cat([last.flip(-1), last.flip(0)], dim=-1)
            batch = add_scores(batch, model, _scores(batch, objective, model, logits, last, layers))
        batches.append(batch)
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def score_by(causal_lm: PreTrainedModel, objective: ObjectiveConfig, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch as if the model itself had written and scored it."""
    scored = []
    for row in batch.select([column.name for column in generated_schema()]).to_pylist():
        ids, mask = torch.tensor(row["token_ids"]), torch.tensor(row["loss_mask"])
        with torch.no_grad():
            decoded = causal_lm.get_decoder()(input_ids=ids[None], output_hidden_states=True)
            hidden, *layers = (
                states[0, :-1][mask[1:] != 0] for states in (decoded.last_hidden_state, *decoded.hidden_states[1:])
            )
            logits = causal_lm.get_output_embeddings()(hidden)
        logprobs, targets = logits.log_softmax(-1), ids[mask != 0]
        arrays = {"token_ids": ids.int().numpy(), "loss_mask": mask.to(torch.uint8).numpy()}
        arrays["version_changes"] = np.array(row["version_changes"], np.int32)
        arrays["rollout_logprobs"] = logprobs.gather(-1, targets[:, None])[:, 0].numpy()
        if objective.needs.candidates_from == "student":
            best = logprobs.topk(objective.needs.num_candidates)
            arrays |= {"candidate_ids": best.indices.int().numpy(), "candidate_rollout_logprobs": best.values.numpy()}
        one = make_generated([GeneratedTrajectory(**{**row, **arrays})])
        for model in objective.needs.models:
            one = add_scores(one, model, _scores(one, objective, model, logits, hidden, torch.cat(layers, -1)))
        scored.append(one)
    return pa.Table.from_batches(scored).combine_chunks().to_batches()[0]


def own_heads(causal_lm: PreTrainedModel, objective: ObjectiveConfig) -> TeacherHeads:
    """Return the model's own head as that of every model of the objective."""
    weight = causal_lm.get_output_embeddings().weight.detach()
    return {ROUTE: {model: LmHead(weight) for model in objective.needs.models}}


def random_heads(objective: ObjectiveConfig, widths: Mapping[str, int]) -> TeacherHeads:
    """Return heads of given widths, by route."""
    random = torch.Generator().manual_seed(5)
    return {
        route: {
            model: LmHead(torch.randn(VOCABULARY, width, generator=random) * 0.3) for model in objective.needs.models
        }
        for route, width in widths.items()
    }


def completion_tokens(batch: pa.RecordBatch) -> int:
    """Return how many tokens of the batch the student wrote."""
    return int(ragged(batch, "rollout_logprobs").lengths.sum())


def put_batch(batch: pa.RecordBatch) -> BatchHandle:
    """Put a batch into the object store as a pool would."""
    import ray  # which tests of losses on a GPU do without

    return BatchHandle(
        reference=ray.put(to_wire(batch)),
        teacher=batch["teacher"][0].as_py(),
        trajectory_ids=tuple(batch["trajectory_id"].to_pylist()),
        num_tokens=tuple(ragged(batch, "token_ids").lengths.tolist()),
        num_completion_tokens=tuple(ragged(batch, "rollout_logprobs").lengths.tolist()),
        prompt_ids=tuple(batch["prompt_id"].to_pylist()),
        rewards=tuple(batch["reward"].to_pylist()),
    )


class Receiver:
    """A rollout actor's receiving verbs, keeping what arrives."""

    def __init__(self, is_deaf: bool = False) -> None:
        self._is_deaf = is_deaf
        self.events: list[str] = []
        self.payloads: list[bytes] = []
        self.weights: dict[str, np.ndarray] = {}

    def start_weight_update(self, first: Sequence[Any]) -> None:
        self.events.append("start")
        self.payloads, self.weights = [], {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        import ray

        payload = ray.get(update_info["reference"][0])
        self.events.append("update")
        self.payloads.append(bytes(payload))
        assert checksum(self.payloads) == update_info["checksum"]
        start = 0
        for name, dtype, shape in zip(update_info["names"], update_info["dtypes"], update_info["shapes"], strict=True):
            values = np.frombuffer(payload, dtype, int(np.prod(shape)), start).reshape(shape)
            self.weights[name] = values.copy()
            start += values.nbytes

    def finish_weight_update(self, policy_version: int) -> str:
        self.events.append(f"finish {policy_version}")
        return checksum(self.payloads[1:] if self._is_deaf else self.payloads)

    def received(self) -> tuple[list[str], dict[str, np.ndarray]]:
        return self.events, self.weights


def _random_row(
    random: np.random.Generator, objective: ObjectiveConfig, index: int, route: str, prompt: int, completion: int
) -> GeneratedTrajectory:
    """Return a trajectory; two of each prompt, of which the first is rewarded, and the last prompt's is alone."""
    candidates: dict[str, Any] = {}
    if objective.needs.candidates_from == "student":
        shape = (completion, objective.needs.num_candidates)
        candidates["candidate_ids"] = random.permuted(
            np.tile(np.arange(VOCABULARY, dtype=np.int32), (completion, 1)), axis=1
        )[:, : shape[1]]
        candidates["candidate_rollout_logprobs"] = random.normal(-4.7, 0.3, shape).astype(np.float32)
    return GeneratedTrajectory(
        trajectory_id=index,
        prompt_id=index // 2,
        sample_index=index % 2,
        teacher=route,
        domain="",
        min_policy_version=0,
        max_policy_version=0,
        token_ids=random.integers(2, VOCABULARY, prompt + completion).astype(np.int32),
        loss_mask=np.repeat(np.array([0, 1], np.uint8), [prompt, completion]),
        rollout_logprobs=random.normal(-4.7, 0.3, completion).astype(np.float32),
        finish_reason="stop",
        reward=float(index % 2 == 0),
        **candidates,
    )


def _scores(
    batch: pa.RecordBatch, objective: ObjectiveConfig, model: str, logits: Tensor, hidden: Tensor, layers: Tensor
) -> Scores:
    """Return what a model of these logits [completion_tokens, vocabulary] says of a batch of one row."""
    logprobs = logits.float().log_softmax(-1)
    token_ids, mask = ragged(batch, "token_ids").values, ragged(batch, "loss_mask").values
    targets = torch.from_numpy(token_ids[mask != 0].astype(np.int64))
    chosen, of_candidates = None, None
    if objective.needs.num_candidates and "candidate_ids" not in batch.schema.names:
        best = logprobs.topk(objective.needs.num_candidates)
        chosen, of_candidates = best.indices.int().numpy(), best.values.numpy()
    elif objective.needs.num_candidates:
        given = torch.from_numpy(ragged(batch, "candidate_ids").values.astype(np.int64))
        of_candidates = logprobs.gather(-1, given).numpy()
    scores = {
        "logprobs": logprobs.gather(-1, targets[:, None])[:, 0].numpy(),
        "candidate_ids": chosen,
        "candidate_logprobs": of_candidates,
        "entropy": -(logprobs.exp() * logprobs).sum(-1).numpy() if objective.needs.teacher_entropy else None,
        "hidden": hidden.numpy() if objective.needs.hidden or model in objective.needs.last_states else None,
        "layers": layers.numpy() if model in objective.needs.layer_states else None,
    }
    return {name: values for name, values in scores.items() if values is not None}


@dataclass(frozen=True)
class WholeStep:
    """A step whose micro-batches are all there."""

    objective: Objective
    num_tokens: int
    teacher_heads: TeacherHeads = field(default_factory=dict)


def accumulate_all(engine: TrainEngine, batches: Iterable[MicroBatch], step: WholeStep) -> dict[str, Metric]:
    """Add up the gradients of all micro-batches of a step."""
    batches = list(batches)
    return accumulate(engine, batches, len(batches), step.objective, step.teacher_heads, completes_step=True)


def train_step(
    engine: TrainEngine, batches: Iterable[MicroBatch], step: WholeStep, learning_rate: float
) -> dict[str, Metric]:
    """Update the weights once and return what this rank saw."""
    parts = accumulate_all(engine, batches, step)
    gradient_norm = engine.step(learning_rate, step.num_tokens)
    return {**parts, "gradient_norm": Max(gradient_norm), "learning_rate": Max(learning_rate)}


def measure_gradient(engine: TrainEngine, batches: Iterable[MicroBatch], step: WholeStep) -> dict[str, Metric]:
    """Return what `train_step` would, without changing the weights."""
    parts = accumulate_all(engine, batches, step)
    return {**parts, "gradient_norm": Max(engine.discard(step.num_tokens))}


def advantages_of(batches: Sequence[pa.RecordBatch]) -> list[float]:
    """Return each row's reward relative to the others of its prompt, rows in order."""
    prompt_ids = [value for batch in batches for value in batch["prompt_id"].to_pylist()]
    rewards = [value for batch in batches for value in batch["reward"].to_pylist()]
    advantages = [0.0] * len(rewards)
    for prompt_id in set(prompt_ids):
        rows = [row for row, found in enumerate(prompt_ids) if found == prompt_id]
        compared = group_advantages([rewards[row] for row in rows], divide_by_deviation=True)
        for row, advantage in zip(rows, compared, strict=True):
            advantages[row] = advantage
    return advantages
