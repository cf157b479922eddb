"""Two real ranks train while their checkpoint is written, and the disk of one of them is full."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from cluster.actors.cluster import RayCluster
from cluster.contracts.batches import ReadyBatches
from cluster.contracts.errors import CheckpointError
from cluster.contracts.metrics import report
from learner.checkpointing.manifest import Layout, verify
from learner.group import LearnerGroup
from tests.learner.support import OBJECTIVES, make_scored, put_batch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAYOUT = Layout(num_ranks=2, zero_stage=2)
LIMIT_BYTES = 50_000  # a shard of the tiny student has several times as many


class LimitedRanks(RayCluster):
    """Makes ranks whose files can be limited."""

    ranks: list[ActorHandle]

    def create(self, _: str, names: Sequence[str], *args: Any) -> list[ActorHandle]:
        own = [f"limited-{name}" for name in names]  # another group's may still be taken
        self.ranks = super().create("tests.learner.limited_rank:LimitedRank", own, *args)
        return self.ranks


@pytest.fixture(scope="module")
def story(make_config: Any, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Train, begin a checkpoint, train on, complete it; then again on a full disk, and again after that."""
    folder = tmp_path_factory.mktemp("beside")
    cluster = LimitedRanks()
    config = make_config("learner.num_workers=2", "learner.zero_stage=2", "objective.support_size=8")
    batch = put_batch(make_scored(OBJECTIVES["topk"]))
    group = LearnerGroup(config, [{"num_cpus": 0.5}] * 2, cluster)
    ranks = cluster.ranks
    told = SimpleNamespace(folder=folder, names_on_full_disk=[])
    try:
        told.logprobs_at_begin = group.student_logprobs(batch)
        pending = group.begin_checkpoint(folder / "step-0", {"step": 0})
        group.step(ReadyBatches([batch]), 0)
        told.logprobs_after_step = group.student_logprobs(batch)
        told.seconds = pending.complete()
        told.shard_bytes = (folder / "step-0" / "rank-1.safetensors").stat().st_size

        ray.get(ranks[1].limit_file_bytes.remote(LIMIT_BYTES))
        pending = group.begin_checkpoint(folder / "step-1", {"step": 1})
        told.figures_on_full_disk = report(group.step(ReadyBatches([batch]), 1))
        with pytest.raises(CheckpointError) as refused:
            pending.complete()
        told.error = str(refused.value)
        told.names_on_full_disk = sorted(path.name for path in folder.iterdir())

        ray.get(ranks[1].limit_file_bytes.remote(None))
        group.begin_checkpoint(folder / "step-2", {"step": 2}).complete()
        group.load_checkpoint(folder / "step-0")
        told.logprobs_restored = group.student_logprobs(batch)
    finally:
        group.shutdown()
    return told


def test_a_step_taken_while_the_checkpoint_is_written_is_not_in_it(story: SimpleNamespace) -> None:
    assert not np.array_equal(story.logprobs_after_step, story.logprobs_at_begin)
    np.testing.assert_array_equal(story.logprobs_restored, story.logprobs_at_begin)


def test_a_checkpoint_says_what_it_cost(story: SimpleNamespace) -> None:
    assert story.seconds.held > 0
    assert story.seconds.writing > 0


def test_a_full_disk_of_one_rank_is_one_sentence_from_the_rank(story: SimpleNamespace) -> None:
    assert story.shard_bytes > LIMIT_BYTES
    assert story.error == f"checkpoint {story.folder}/step-1.partial: cannot write rank-1.safetensors: File too large"


def test_a_full_disk_leaves_training_and_earlier_checkpoints_alone(story: SimpleNamespace) -> None:
    assert story.figures_on_full_disk["gradient_norm"] > 0
    assert story.names_on_full_disk == ["step-0"]
    verify(story.folder / "step-0", LAYOUT)


def test_the_next_checkpoint_is_written_when_there_is_room_again(story: SimpleNamespace) -> None:
    verify(story.folder / "step-2", LAYOUT)
