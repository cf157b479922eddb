"""Memory shares of one GPU, and how weights travel; the numbers are worked out by hand."""

import pytest

from cluster.contracts.errors import PlacementError
from cluster.placement.gpu_sharing import share_gpu, with_gpus
from cluster.placement.placement import NodeResources, describe, plan_placement
from cluster.vllm.engine import SHARED_GPU_VARIABLE
from cluster.weight_sync.transports import choose
from tests.builders import make_config

SHARED = "ray.share_gpu=true"


def test_engines_divide_what_the_learner_and_the_processes_leave() -> None:
    shares = share_gpu(make_config(SHARED, "rollout.num_workers=2", "learner.gpu_memory_fraction=0.35"))
    assert shares.rollout == pytest.approx((1 - 0.05 - 0.35) / 3)  # two rollout workers and a teacher
    assert shares.teachers == {"main": pytest.approx(0.2)}
    assert shares.learner == 0.35


def test_a_share_that_is_set_stays_and_the_others_divide_the_rest() -> None:
    shares = share_gpu(make_config(SHARED, "teachers.main.engine.gpu_memory_fraction=0.3"))
    assert shares.teachers == {"main": 0.3}
    assert shares.rollout == pytest.approx(1 - 0.05 - 0.4 - 0.3)


def test_a_teacher_that_needs_no_gpu_takes_nothing_of_it() -> None:
    elsewhere = "teachers.main={model='big',url='http://host:8000/v1'}"
    assert share_gpu(make_config(SHARED, elsewhere)).rollout == pytest.approx(1 - 0.05 - 0.4)
    placement = plan_placement(make_config(SHARED, elsewhere), [NodeResources(4, 1)])
    assert [pool.gpus_per_worker for pool in placement.pools] == [pytest.approx(0.55), 0, 0.4]


def test_shares_that_fill_the_gpu_exactly_fit_and_more_is_refused_with_the_numbers() -> None:
    both = [SHARED, "teachers.main.engine.gpu_memory_fraction=0.3"]
    assert share_gpu(make_config(*both, "rollout.engine.gpu_memory_fraction=0.25")).rollout == 0.25
    with pytest.raises(
        PlacementError,
        match=r"rollout 1 x 0.26, teacher-main 1 x 0.3, learner 0.4, 0.05 for processes leave -0.01; lower",
    ):
        share_gpu(make_config(*both, "rollout.engine.gpu_memory_fraction=0.26"))


def test_engines_that_would_get_nothing_are_refused() -> None:
    config = make_config(SHARED, "learner.gpu_memory_fraction=0.92")
    with pytest.raises(PlacementError, match=r"leave 0.03 for 2 more engines, which need 0.02 each"):
        share_gpu(config)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.engine.tensor_parallel=2", "rollout: engine.tensor_parallel is 2"),
        ("teachers.main.engine.tensor_parallel=4", "teacher-main: engine.tensor_parallel is 4"),
        ("learner.num_workers=2", "learner.num_workers is 2"),
    ],
)
def test_what_needs_several_gpus_does_not_share_one(override: str, sentence: str) -> None:
    with pytest.raises(PlacementError, match=sentence):
        share_gpu(make_config(SHARED, override))


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "transport"),
    [
        ([], False, "object_store"),
        ([], True, "nccl"),
        ([SHARED], True, "ipc"),
        ([SHARED], False, "object_store"),  # there is nothing to share
        (["weight_sync.payload=delta"], True, "object_store"),
        (["weight_sync.transport=object_store"], True, "object_store"),
        (["weight_sync.transport=nccl"], True, "nccl"),
        (["weight_sync.transport=ipc", SHARED], True, "ipc"),
    ],
)
def test_weights_take_the_fastest_way_that_there_is(overrides: list[str], on_gpu: bool, transport: str) -> None:
    assert choose(make_config(*overrides), on_gpu)[1] == transport


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "sentence"),
    [
        (["weight_sync.transport=nccl"], False, "'nccl' needs GPUs, and the cluster has none"),
        (["weight_sync.transport=ipc", SHARED], False, "'ipc' needs GPUs, and the cluster has none"),
        (["weight_sync.transport=nccl", SHARED], True, "'nccl' needs a GPU per worker"),
        (["weight_sync.transport=ipc"], True, "'ipc' needs ray.share_gpu"),
    ],
)
def test_a_way_that_cannot_be_taken_is_refused(overrides: list[str], on_gpu: bool, sentence: str) -> None:
    with pytest.raises(PlacementError, match=sentence):
        choose(make_config(*overrides), on_gpu)


def test_choosing_twice_changes_nothing() -> None:
    once = with_gpus(make_config(SHARED), on_gpu=True)
    assert with_gpus(once, on_gpu=True) == once
    assert once.weight_sync.transport == "ipc"
    assert once.rollout.engine.gpu_memory_fraction == pytest.approx(0.275)


def test_everybody_gets_a_part_of_one_gpu_on_one_node() -> None:
    nodes = [NodeResources(8, 0, "aa" * 28), NodeResources(2, 1, "bb" * 28), NodeResources(4, 1, "cc" * 28)]
    placement = plan_placement(make_config(SHARED), nodes)
    assert {node.node_id for pool in placement.pools for node in pool.nodes} == {
        "cc" * 28
    }  # the most CPUs beside a GPU
    assert [pool.gpus_per_worker for pool in placement.pools] == [pytest.approx(0.275), pytest.approx(0.275), 0.4]
    assert sum(pool.num_workers * pool.cpus_per_worker for pool in placement.pools) <= 4
    [options] = placement.rollout.options()
    assert options["num_gpus"] == pytest.approx(0.275)
    assert options["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "1", SHARED_GPU_VARIABLE: "1"}}
    assert describe(placement)[2] == ("learner", "1 x 0.4 GPU")


def test_a_gpu_that_others_use_is_not_shared() -> None:
    nodes = [NodeResources(4, 1, "a")]
    with pytest.raises(
        PlacementError, match=r"ray\.share_gpu needs one GPU that nobody uses, and none is free on 1 nodes"
    ):
        plan_placement(make_config(SHARED), nodes, [NodeResources(4, 0, "a")])


def test_a_part_of_a_gpu_beside_others_is_refused_for_ray_takes_it_of_any() -> None:
    several, single = NodeResources(16, 8, "aa" * 28), NodeResources(4, 1, "bb" * 28)
    placement = plan_placement(make_config(SHARED), [several, single])
    assert {node.node_id for pool in placement.pools for node in pool.nodes} == {single.node_id}
    with pytest.raises(PlacementError, match=r"needs a node with one GPU, .* with --num-gpus 1"):
        plan_placement(make_config(SHARED), [several])
    with pytest.raises(PlacementError, match="needs a node with one GPU"):  # seven others are in use
        plan_placement(make_config(SHARED), [several], [NodeResources(16, 1, "aa" * 28)])


def test_without_gpus_there_is_nothing_to_share() -> None:
    nodes = [NodeResources(4, 0, "a")]
    assert plan_placement(make_config(SHARED), nodes) == plan_placement(make_config(), nodes)
    assert not plan_placement(make_config(SHARED), nodes).on_gpu


def test_a_backend_that_cannot_work_is_refused_before_anything_starts() -> None:
    with pytest.raises(PlacementError, match="the cluster has none"):
        plan_placement(make_config("weight_sync.transport=nccl"), [NodeResources(4, 0, "a")])
