import pytest

from cluster.contracts.errors import PlacementError
from cluster.placement.placement import NodeResources, describe, plan_placement
from tests.builders import make_config


def test_each_gpu_worker_reserves_whole_gpus() -> None:
    config = make_config("rollout.num_workers=2", "teachers.main.engine.tensor_parallel=4", "learner.num_workers=2")
    placement = plan_placement(config, [NodeResources(cpus=32, gpus=8)])
    assert [(pool.name, pool.num_workers, pool.gpus_per_worker) for pool in placement.pools] == [
        ("rollout", 2, 1),
        ("teacher-main", 1, 4),
        ("learner", 2, 1),
    ]


def test_the_workers_of_a_teacher_behind_a_url_reserve_no_gpu() -> None:
    config = make_config("teachers.main={model='big',url='http://host:8000/v1',num_workers=2}")
    placement = plan_placement(config, [NodeResources(cpus=32, gpus=2)])
    assert [(pool.name, pool.num_workers, pool.gpus_per_worker) for pool in placement.pools] == [
        ("rollout", 1, 1),
        ("teacher-main", 2, 0),
        ("learner", 1, 1),
    ]


def test_teachers_of_a_slot_reserve_their_gpus_once() -> None:
    slot = [
        f"teachers.{name}={{model='t',slot='s',engine={{tensor_parallel=2}}}}" for name in ("main", "code", "prose")
    ]
    placement = plan_placement(make_config(*slot), [NodeResources(cpus=32, gpus=4)])
    assert [(pool.name, pool.num_workers, pool.gpus_per_worker) for pool in placement.pools] == [
        ("rollout", 1, 1),
        ("slot-s", 1, 2),
        ("learner", 1, 1),
    ]
    assert set(placement.teachers) == {"main", "code", "prose"}
    with pytest.raises(PlacementError, match="the run needs 4 GPUs and the cluster has 3"):
        plan_placement(make_config(*slot), [NodeResources(cpus=32, gpus=3)])


def test_a_teacher_without_workers_reserves_nothing_and_has_a_share_for_later() -> None:
    config = make_config("teachers.code={model='b',num_workers=0,engine={tensor_parallel=4}}")
    placement = plan_placement(config, [NodeResources(cpus=32, gpus=3)])
    assert placement.teachers["code"].options() == []
    share = placement.teachers["code"].share
    assert (share["num_cpus"], share["num_gpus"]) == (1.0, 4)
    assert ("teacher-code", "0 x 4 GPU") in describe(placement)


def test_beside_a_gpu_learner_and_teachers_share_the_nodes_cores_and_generators_have_one_thread() -> None:
    config = make_config("rollout.num_workers=4", "teachers.main.engine.tensor_parallel=2", "learner.num_workers=2")
    placement = plan_placement(config, [NodeResources(cpus=64, gpus=8)])
    threads = {
        pool.name: {option["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] for option in pool.options()}
        for pool in placement.pools
    }
    assert threads == {"rollout": {"1"}, "teacher-main": {"9"}, "learner": {"9"}}  # 64 cores for 7 workers
    set_by_hand = make_config("learner.cpu_threads=24", "rollout.engine.cpu_threads=2")
    placement = plan_placement(set_by_hand, [NodeResources(cpus=64, gpus=8)])
    assert (placement.learner.cpu_threads, placement.rollout.cpu_threads) == (24, 2)


def test_too_few_gpus_are_said_with_numbers() -> None:
    config = make_config("rollout.num_workers=4")
    with pytest.raises(PlacementError, match=r"learner worker 0 needs 1 GPUs .* needs 6 GPUs and the cluster has 5"):
        plan_placement(config, [NodeResources(cpus=32, gpus=5)])


def test_who_has_too_few_gpus_hears_that_a_run_can_share_one_unless_it_cannot() -> None:
    advice = r"needs 3 GPUs and the cluster has 1 on 1 nodes; ray\.share_gpu = true puts all of it on one GPU$"
    with pytest.raises(PlacementError, match=advice):
        plan_placement(make_config(), [NodeResources(cpus=32, gpus=1)])
    for wide in ("learner.num_workers=2", "rollout.engine.tensor_parallel=2"):
        with pytest.raises(PlacementError, match=r"needs 4 GPUs and the cluster has 1 on 1 nodes$"):
            plan_placement(make_config(wide), [NodeResources(cpus=32, gpus=1)])


def test_an_engine_is_not_split_over_nodes() -> None:
    config = make_config("teachers.main.engine.tensor_parallel=8")
    with pytest.raises(PlacementError, match="teacher-main worker 0 needs 8 GPUs on one node, 4 are left"):
        plan_placement(config, [NodeResources(16, 4)] * 4)


def test_without_gpus_the_pools_share_the_cores() -> None:
    placement = plan_placement(make_config(), [NodeResources(cpus=2, gpus=0)])
    assert [pool.gpus_per_worker for pool in placement.pools] == [0, 0, 0]
    assert sum(pool.num_workers * pool.cpus_per_worker for pool in placement.pools) <= 2
    assert (placement.rollout.cpu_threads, placement.learner.cpu_threads) == (1, 2)


def test_configured_threads_win_over_the_share() -> None:
    config = make_config("rollout.engine.cpu_threads=7", "learner.cpu_threads=3")
    placement = plan_placement(config, [NodeResources(cpus=2, gpus=0)])
    assert (placement.rollout.cpu_threads, placement.learner.cpu_threads) == (7, 3)


def test_every_pool_has_a_line_for_people() -> None:
    placement = plan_placement(make_config(), [NodeResources(cpus=4, gpus=0)])
    assert describe(placement)[0] == ("rollout", "1 x 2 CPU threads")


def test_a_cluster_without_cpus_is_refused() -> None:
    with pytest.raises(PlacementError, match="offers no CPU"):
        plan_placement(make_config(), [])


def test_on_several_nodes_no_more_workers_are_planned_than_fit() -> None:
    config = make_config("rollout.num_workers=2", "teachers.main.num_workers=2")
    placement = plan_placement(
        config, [NodeResources(0, 0, "head"), NodeResources(2, 0, "a"), NodeResources(2, 0, "b")]
    )
    assert {pool.cpus_per_worker for pool in placement.pools} == {0.6666}
    nodes = [node.node_id for pool in placement.pools for node in pool.nodes]
    assert sorted(nodes) in (["a"] * 3 + ["b"] * 2, ["a"] * 2 + ["b"] * 3)
    assert placement.rollout.cpu_threads == 1  # two engines, a generator and a scorer, share a node's two cores


def test_every_worker_is_told_its_node_but_may_leave_it_when_it_dies() -> None:
    [options] = plan_placement(make_config(), [NodeResources(4, 3, "ab" * 28)]).learner.options()
    strategy = options["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft, options["num_gpus"]) == ("ab" * 28, True, 1)


def test_what_others_use_is_not_planned_with_and_the_numbers_are_said() -> None:
    nodes = [NodeResources(8, 2, "a"), NodeResources(8, 2, "b")]
    free = [NodeResources(8, 2, "a"), NodeResources(8, 0, "b")]
    assert plan_placement(make_config(), nodes).learner.num_workers == 1
    with pytest.raises(PlacementError, match="the run needs 3 GPUs and 2 of the cluster's 4 are free on 2 nodes"):
        plan_placement(make_config(), nodes, free)


def test_a_pool_on_several_nodes_says_so() -> None:
    placement = plan_placement(
        make_config("rollout.num_workers=2"), [NodeResources(8, 2, "a"), NodeResources(8, 2, "b")]
    )
    assert describe(placement)[0] == ("rollout", "2 x 1 GPU on 2 nodes")
