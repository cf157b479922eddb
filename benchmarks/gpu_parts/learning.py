"""The learner alone: the same losses as on a CPU, and what packed attention brings."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.cases.objective import interleaved, peak_bytes
from benchmarks.cases.teacher_scoring import Setting, make_batches
from benchmarks.gpu_parts.shapes import Scale, model_folder
from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import Row, at_most, row
from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import expand_preset
from cluster.config.sections import StudentConfig
from cluster.config.stages import Attention, LearnerConfig
from cluster.contracts.errors import ModelError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import add_scores, ragged
from cluster.models.lm_head import LmHead, load_lm_head
from cluster.models.token_scores import score_tokens
from learner.batching.micro_batch import MicroBatch, build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from learner.model.student import load_student

EMBEDDED = ROOT / "cluster/embedded"
COMPARED = ("thinking-machines", "tail-topk", "exact-reverse-kl", "gkd")
MAX_DIFFERENCE_NATS = 1e-4
ROUTE = "main"  # of the random trajectories
HOST = torch.device("cpu")
ATTENTIONS: tuple[Attention, ...] = ("masked", "grouped", "varlen", "flash")


def rows(scale: Scale, folder: Path, _seconds: float) -> Iterator[Row]:
    """Compare the card's losses with the CPU's, then time the student's steps with each kind of attention."""
    for preset in COMPARED:
        yield from same_losses_rows(scale.device, preset)
    yield from attention_rows(scale, model_folder(scale, scale.student, folder))


def same_losses_rows(device: torch.device, preset: str) -> list[Row]:
    """Evaluate the embedded pair in float32 on the CPU and on the device."""
    objective = msgspec.convert(expand_preset({"preset": preset}), ObjectiveConfig)
    head = load_lm_head(str(EMBEDDED / "teacher"), False, "float32")
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher", dtype=torch.float32)
    written = make_batches(Setting("", "", "float32", 24, 16, 112), head.vocabulary_size)
    scored = [score_alone(batch, teacher, head, objective) for batch in written]
    expected, expected_norm = evaluate_on(HOST, "masked", scored, (objective, head))
    found, norm = evaluate_on(device, "grouped", scored, (objective, head))  # what a card does with float32
    size = f"embedded pair, {preset}, {len(found)} tokens"
    difference = (found - expected).abs().max().item()
    return [
        at_most(row("losses: CPU against card, largest difference", size, difference, "nats"), MAX_DIFFERENCE_NATS),
        row("gradient norm: CPU against card", size, abs(norm / expected_norm - 1), "ratio"),
    ]


def score_alone(
    batch: pa.RecordBatch, teacher: PreTrainedModel, head: LmHead, objective: ObjectiveConfig
) -> pa.RecordBatch:
    """Score a batch by the teacher's own forward on each trajectory."""
    token_ids, masks = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
    hidden, targets = [], []
    for index in range(batch.num_rows):
        ids = torch.from_numpy(token_ids[index].copy()).long()
        with torch.no_grad():
            states = teacher.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
        hidden.append(states[np.flatnonzero(masks[index]) - 1])
        targets.append(token_ids[index][masks[index] != 0])
    request = ScoreRequest("teacher", top_k=objective.needs.num_candidates, hidden=objective.needs.hidden)
    return add_scores(batch, "teacher", score_tokens(head, torch.cat(hidden), np.concatenate(targets), request))


def evaluate_on(
    device: torch.device,
    attention: Attention,
    scored: Sequence[pa.RecordBatch],
    task: tuple[ObjectiveConfig, LmHead],
) -> tuple[torch.Tensor, float]:
    """Return the loss of every token, and the norm of their mean's gradient."""
    config, (objective, head) = LearnerConfig(dtype="float32", attention=attention), task
    engine = ReferenceEngine(load_student(StudentConfig(str(EMBEDDED / "student")), config, device), config)
    heads = {ROUTE: {"teacher": head.to(device)}} if objective.needs.hidden else {}
    losses, kernels = [], choose_kernels(device, objective.needs.hidden)
    for batch in grids_of(scored, micro_batch_tokens=2048):
        found = engine.forward(batch.to(device), Objective(objective, kernels), heads)
        engine.backward(found.loss, is_last=False)
        losses.append(found.losses.cpu())
    tokens = torch.cat(losses)
    return tokens, engine.discard(len(tokens))


def grids_of(batches: Sequence[pa.RecordBatch], micro_batch_tokens: int) -> list[MicroBatch]:
    """Cut trajectories into micro-batches."""
    found = trajectories(batches)
    (grids,) = plan_step([len(one.token_ids) for one in found], 1, micro_batch_tokens)
    return [build_micro_batch(grid, found, seed=0) for grid in grids]


def attention_rows(scale: Scale, student: Path) -> Iterator[Row]:
    """Time one micro-batch on its written tokens alone, and the memory that it takes, for each kind of attention."""
    batch = long_tailed_batch(scale).to(scale.device)
    config = msgspec.convert(expand_preset({"preset": "thinking-machines"}), ObjectiveConfig)
    objective = Objective(config, choose_kernels(scale.device, config.needs.hidden))
    size = f"{scale.student.name}, {len(batch.lengths)} trajectories, {sum(batch.lengths)} tokens"
    for attention in ATTENTIONS:
        try:
            engine = engine_with(scale, student, attention)
        except ModelError as error:
            print(f"not measured: {error}", flush=True)
            continue
        run = partial(train_on, engine, batch, objective)
        seconds = interleaved({attention: run}, scale.device, scale.repeats)[attention]
        yield row(f"learn alone: attention {attention}", size, sum(batch.lengths) / seconds, "tokens/s")
        yield row(f"learn alone: peak memory, attention {attention}", size, peak_bytes(run, scale.device) / 1e9, "GB")
        del engine, run


def engine_with(scale: Scale, student: Path, attention: Attention) -> ReferenceEngine:
    """Load the student."""
    config = LearnerConfig(dtype=scale.dtype_name, attention=attention)
    return ReferenceEngine(load_student(StudentConfig(str(student)), config, scale.device), config)


def train_on(engine: ReferenceEngine, batch: MicroBatch, objective: Objective) -> None:
    """Do one optimizer step."""
    engine.backward(engine.forward(batch, objective).loss, is_last=True)
    engine.step(1e-6, len(batch.tokens))


def long_tailed_batch(scale: Scale) -> MicroBatch:
    """Draw trajectories with the lengths that the loop's completions have, up to a micro-batch's tokens."""
    draw = np.random.default_rng(1)
    count = max(2, scale.micro_batch_tokens // (2 * (scale.prompt_tokens + scale.mean_tokens)))
    lengths = scale.prompt_tokens + np.minimum(scale.max_tokens, draw.geometric(1 / scale.mean_tokens, count))
    batches = []
    for length in lengths:
        setting = Setting("", "", "float32", 1, scale.prompt_tokens, int(length) + 1)
        (batch,) = make_batches(setting, scale.student.vocabulary, shortest=int(length))
        written = len(ragged(batch, "rollout_logprobs").values)
        batches.append(add_scores(batch, "teacher", {"logprobs": np.full(written, -3.0, np.float32)}))
    grids = grids_of(batches, micro_batch_tokens=scale.micro_batch_tokens)
    return max(grids, key=lambda grid: sum(grid.lengths))
