from typing import Any

import pytest
import ray

from cluster.placement.capacity import SplitCapacity, missing_for
from cluster.placement.placement import NodeResources, PoolPlacement
from tests.failing_actor import FailingActor

GPUS = {"rollout": 1, "teachers.main": 2}
HOMES = {"rollout": ["a", "a", "b", "b"], "teachers.main": ["a"]}


def make_room(free: dict[str, int]) -> SplitCapacity:
    room = SplitCapacity(GPUS)
    room.update(free, HOMES)
    return room


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ({"rollout": 4, "teachers.main": 1}, True),
        ({"rollout": 2, "teachers.main": 2}, True),  # the last two leave node b together
        ({"rollout": 3, "teachers.main": 2}, False),  # one GPU of node b
        ({"rollout": 1, "teachers.main": 2}, True),
        ({"rollout": 6, "teachers.main": 0}, True),  # the teacher's two GPUs
        ({"rollout": 7, "teachers.main": 0}, False),
    ],
)
def test_a_worker_needs_its_gpus_on_one_node(sizes: dict[str, int], fits: bool) -> None:
    assert make_room({"a": 0, "b": 0}).fits(sizes) == fits


def test_halves_of_an_engine_on_two_nodes_are_none() -> None:
    assert not make_room({"a": 1, "b": 1}).fits({"rollout": 4, "teachers.main": 2})
    assert make_room({"a": 0, "b": 2}).fits({"rollout": 4, "teachers.main": 2})


def test_without_gpus_there_is_always_room() -> None:
    assert SplitCapacity({"rollout": 0, "teachers.main": 0}).fits({"rollout": 100, "teachers.main": 100})


def test_another_part_of_a_shared_gpu_needs_room_on_that_very_gpu(ray_cluster: None) -> None:
    there = NodeResources(8, 1, ray.get_runtime_context().get_node_id())
    of_one = PoolPlacement("rollout", 1, 0.25, 0.5, 1, (there,))
    # The cluster of the tests has none.
    assert missing_for((of_one, 2)) == "2 more workers need 0.5 GPUs, and 0 of the shared one are free"


def test_where_workers_are_is_asked_of_the_cluster(ray_cluster: None) -> None:
    worker: Any = ray.remote(num_cpus=0)(FailingActor).remote(0)
    ray.get(worker.answer.remote())  # one that still starts is on no node
    node = ray.get_runtime_context().get_node_id()
    room = SplitCapacity({"rollout": 1})
    room.read({"rollout": [worker]})
    # Whoever leaves that node makes room there for one, and for no more: the cluster has no GPU.
    room.update({node: 0}, room._homes)
    assert room.fits({"rollout": 1})
    assert not room.fits({"rollout": 2})
    assert room._homes == {"rollout": [node]}
