"""DeepSpeed ZeRO 1, 2 and 3 with two ranks on Ray against one process of plain torch, and all that a group offers.

One story per stage runs once; the tests look at what it left behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.errors import CheckpointError, ModelError, WeightSyncError
from cluster.contracts.metrics import report
from cluster.contracts.trajectory import ragged
from cluster.weight_sync.manifest import WeightSyncReport
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.checkpointing.export import export_checkpoint
from learner.engines.torch import ReferenceEngine
from learner.group import LearnerGroup
from learner.loss.objective import Objective
from learner.model.completion_head import load_teacher_heads
from learner.model.student import load_student
from learner.train_step import learning_rate_at
from tests.learner.support import (
    LENGTHS,
    OBJECTIVES,
    Receiver,
    WholeStep,
    advantages_of,
    completion_tokens,
    make_scored,
    measure_gradient,
    put_batch,
    score_by,
    train_step,
)

pytestmark = pytest.mark.slow

STEPS = 3
MEASURED = ["sampled", "topk", "samples", "first_pass", "reward", "full", "states"]
STREAMED = ["topk", "samples", "full"]
OWN_OPTIMUM = [name for name in MEASURED if name != "reward"]


@dataclass
class Story:
    """What one stage's group did."""

    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # by objective, before training
    measured_on_itself: dict[str, dict[str, float]] = field(default_factory=dict)
    measured_row_by_row: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    next_step: dict[str, float] = field(default_factory=dict)
    next_step_after_load: dict[str, float] = field(default_factory=dict)
    restored_state: dict[str, Any] = field(default_factory=dict)
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0))
    sync: WeightSyncReport | None = None
    received: tuple[list[str], dict[str, np.ndarray]] = ([], {})
    deaf_worker_error: Exception | None = None
    load_error: Exception | None = None
    exported: Path = Path()
    checkpoint: Path = Path()


# DeepSpeed serves stages 1 and 2 with the same class, and our code does not tell them apart.
STAGES = [
    pytest.param(1, id="zero1", marks=pytest.mark.exhaustive),
    pytest.param(2, id="zero2"),
    pytest.param(3, id="zero3"),
]


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def config(stage, make_config, wide_folder):
    return make_config(
        f"learner.zero_stage={stage}",
        "objective.preset=gkd",
        "teachers.only.engine.dtype=float32",
        f"teachers.wide.model={wide_folder}",
        "teachers.wide.engine.dtype=float32",
        "learner.num_workers=2",
        "rollout.samples_per_prompt=2",
        "learner.micro_batch_tokens=48",
        "learner.lr_schedule=linear",
        "learner.gradient_checkpointing=true",
        f"learner.attention={'grouped' if stage == 3 else 'masked'}",
        f"run.steps={STEPS}",
        # So small that clipping decides how far a step goes, beside an epsilon that lets AdamW show it.
        "learner.max_gradient_norm=1e-3",
        "learner.epsilon=1e-5",
        "weight_sync.bucket_bytes=30000",
    )


@pytest.fixture(scope="module")
def heads(config):
    return load_teacher_heads(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def batches(heads):
    """Return the batches of a step for each objective; two routes where hidden states meet heads."""
    found = {}
    for name in MEASURED:
        objective, of_routes = OBJECTIVES[name], heads if name == "full" else None
        first = make_scored(objective, LENGTHS[:3], "only", of_routes)
        found[name] = [first, make_scored(objective, LENGTHS[3:], "wide", of_routes, first_id=3)]
    return found


@pytest.fixture(scope="module")
def own(make_config, scored):
    """Return trajectories that the student itself scored, for each objective."""
    config = make_config()
    causal_lm = load_student(config.student, config.learner).causal_lm
    return {name: score_by(causal_lm, OBJECTIVES[name], scored) for name in OWN_OPTIMUM}


class OneByOne(ReadyBatches):
    """Gives out one batch at a time, the last one first."""

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        return [self._handles.pop()]


@pytest.fixture(scope="module")
def story(config, batches, own, ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    group = LearnerGroup(config, [{"num_cpus": 0.5}, {"num_cpus": 0.5}])
    told = Story(exported=folder / "export", checkpoint=folder / "step-3")
    try:
        handles = {name: [put_batch(batch) for batch in found] for name, found in batches.items()}
        for name in MEASURED:
            told.measured[name] = report(group.measure_gradient(ReadyBatches(handles[name]), OBJECTIVES[name]))
        for name in STREAMED:
            rows = [batch.slice(row, 1) for batch in batches[name] for row in range(batch.num_rows)]
            one_by_one = OneByOne([put_batch(row) for row in rows])
            told.measured_row_by_row[name] = report(group.measure_gradient(one_by_one, OBJECTIVES[name]))
        for name, batch in own.items():
            itself = ReadyBatches([put_batch(batch)])
            told.measured_on_itself[name] = report(group.measure_gradient(itself, OBJECTIVES[name]))
        tell(group, told, handles["full"])
    finally:
        group.shutdown()
    return told


def tell(group, told, handles):
    told.steps = [report(group.step(ReadyBatches(handles), step)) for step in range(STEPS)]
    told.logprobs = group.student_logprobs(handles[1])
    group.export(told.exported)
    receiver, deaf = ray.remote(Receiver).remote(), ray.remote(Receiver).remote(is_deaf=True)
    told.sync = group.publish_weights([receiver], policy_version=3)
    told.received = ray.get(receiver.received.remote())
    with pytest.raises(WeightSyncError) as refused:
        group.publish_weights([receiver, deaf], policy_version=4)
    told.deaf_worker_error = refused.value
    group.begin_checkpoint(told.checkpoint, {"step": 3}).complete()
    told.next_step = report(group.step(ReadyBatches(handles), STEPS - 1))
    told.restored_state = group.load_checkpoint(told.checkpoint)
    told.next_step_after_load = report(group.step(ReadyBatches(handles), STEPS - 1))
    with pytest.raises(CheckpointError) as refused:
        group.load_checkpoint(told.checkpoint.with_name("step-99"))
    told.load_error = refused.value


@pytest.fixture(scope="module")
def reference(config, batches, heads):
    """Train with plain torch as the group did; return the engine, the figures of its steps, and the one after."""
    learner = msgspec.structs.replace(config.learner, attention="masked")
    engine = ReferenceEngine(load_student(config.student, learner), learner)
    measured = {}
    for name in MEASURED:
        micro_batch, tokens = in_one_micro_batch(batches[name])
        task = WholeStep(Objective(OBJECTIVES[name]), tokens, heads)
        measured[name] = report(measure_gradient(engine, [micro_batch], task))
    micro_batch, tokens = in_one_micro_batch(batches["full"])
    task = WholeStep(Objective(config.objective), tokens, heads)
    rates = [learning_rate_at(step, STEPS, config.learner) for step in range(STEPS)]
    steps = [report(train_step(engine, [micro_batch], task, rate)) for rate in rates]
    return engine, measured, steps


def in_one_micro_batch(found):
    """Return all trajectories of a step in one micro-batch, and the number of their completion tokens."""
    rows = trajectories(found, advantages_of(found))
    ((grid,),) = plan_step([len(row.token_ids) for row in rows], 1, 1000)
    return build_micro_batch(grid, rows, seed=0), sum(completion_tokens(batch) for batch in found)


def test_ranks_run_equally_many_micro_batches_though_their_shares_differ(story, scored):
    lengths = ragged(scored, "token_ids").lengths.tolist()
    plan = plan_step(lengths, 2, 48)
    assert sorted(sum(bool(grid) for grid in grids) for grids in plan) == [2, 3]
    assert story.steps[0]["micro_batches"] == 2 * 3  # of both ranks


@pytest.mark.parametrize("name", MEASURED)
def test_loss_and_gradient_of_every_objective_equal_those_of_plain_torch(story, reference, name):
    ours, plain = story.measured[name], reference[1][name]
    assert ours.keys() == plain.keys()
    for figure in plain.keys() - {"micro_batches", "busy_seconds", "gradient_norm"}:
        assert ours[figure] == pytest.approx(plain[figure], abs=1e-5, rel=1e-5), figure
    assert ours["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("name", STREAMED)
def test_rows_that_arrive_one_by_one_in_another_order_give_the_same_gradient(story, name):
    at_once, streamed = story.measured[name], story.measured_row_by_row[name]
    assert streamed["gradient_norm"] == pytest.approx(at_once["gradient_norm"], rel=1e-6)
    assert streamed["loss"] == pytest.approx(at_once["loss"], rel=1e-6)


def test_three_steps_give_the_losses_of_plain_torch(story, reference):
    _, _, steps = reference
    for ours, plain in zip(story.steps, steps, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["learning_rate"] == plain["learning_rate"]
        assert ours["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4)


def test_three_steps_give_the_weights_of_plain_torch(story, reference):
    engine, _, _ = reference
    exported = AutoModelForCausalLM.from_pretrained(story.exported, dtype=torch.float32).state_dict()
    expected = engine.student.causal_lm.state_dict()
    torch.testing.assert_close(exported, expected, atol=1e-4, rtol=0)


def test_a_student_that_is_its_own_teacher_has_no_loss_and_no_gradient(story):
    for name, figures in story.measured_on_itself.items():
        assert abs(figures["loss"]) < 1e-5, name
        assert figures["gradient_norm"] < 1e-5, name


def test_the_export_has_the_groups_own_logprobs_and_a_tokenizer(story, batches):
    model = AutoModelForCausalLM.from_pretrained(story.exported, dtype=torch.float32)
    expected = ragged(score_by(model, OBJECTIVES["sampled"], batches["full"][1]), "teacher_logprobs").values
    np.testing.assert_allclose(story.logprobs, expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(story.exported).eos_token == "<1>"
    assert (story.exported / "generation_config.json").is_file()


def test_the_checkpoints_files_alone_give_the_exported_weights(story, config, tmp_path):
    export_checkpoint(config, story.checkpoint, tmp_path / "from-checkpoint")
    ours, groups = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (tmp_path / "from-checkpoint", story.exported)
    )
    torch.testing.assert_close(ours, groups, atol=0, rtol=0)


def test_rollout_workers_receive_the_exported_weights_under_their_hugging_face_names(story):
    exported = AutoModelForCausalLM.from_pretrained(story.exported, dtype=torch.float32)
    events, received = story.received
    assert received.keys() == dict(exported.named_parameters()).keys()
    for name, parameter in exported.named_parameters():
        np.testing.assert_array_equal(received[name], parameter.detach().numpy(), err_msg=name)
    assert events[0] == "start"
    assert events[-1] == "finish 3"
    assert set(events[1:-1]) == {"update"}
    assert len(events) > 4, "the weights must travel in several buckets"
    assert story.sync.policy_version == 3
    assert story.sync.num_bytes == sum(value.nbytes for value in received.values())


def test_a_worker_with_another_checksum_is_named(story):
    assert str(story.deaf_worker_error).startswith("rollout worker 1: policy version 4 was sent with checksum")


def test_a_restored_checkpoint_takes_the_same_next_step(story):
    assert story.restored_state == {"step": 3}
    for figure in ("loss", "gradient_norm", "kl", "learning_rate"):
        # How the step is cut depends on when batches arrive, and the cut on the last digits.
        assert story.next_step_after_load[figure] == pytest.approx(story.next_step[figure], rel=1e-6), figure
    assert not story.checkpoint.with_name("step-3.partial").exists()
    names = ["manifest.json", "rank-0.safetensors", "rank-1.safetensors", "state.json"]
    assert sorted(path.name for path in story.checkpoint.iterdir()) == names


def test_an_absent_checkpoint_is_one_sentence(story):
    assert str(story.load_error).endswith("step-99: no readable manifest.json in it: No such file or directory")


def test_a_missing_student_surfaces_as_our_own_error(make_config, ray_cluster, tmp_path):
    config = make_config(f"student.model={tmp_path}/absent")
    for _ in range(2):  # the second time, the names of the first actors must be free again
        with pytest.raises(ModelError, match="no such directory"):
            LearnerGroup(config, [{"num_cpus": 0.5}])
