import pytest

from cluster.contracts.errors import PlacementError
from cluster.placement.bin_packing import Demand, NodeCapacity, largest_equal_share, pack

WHERE = "the end"


def gpus(*counts: int) -> list[NodeCapacity]:
    return [NodeCapacity.of(cpus=64, gpus=count) for count in counts]


def engines(pool: str, num_workers: int, width: int = 1) -> Demand:
    return Demand(pool, num_workers, NodeCapacity.of(cpus=1, gpus=width))


def learner(num_workers: int) -> Demand:
    return Demand("learner", num_workers, NodeCapacity.of(cpus=1, gpus=1), together=True)


@pytest.mark.parametrize(
    ("cpus", "workers", "share"),
    [
        ([2, 2], 5, 6666),  # three on one node and two on the other; 4 / 5 would let only two on each
        ([2], 3, 6666),
        ([4, 4], 3, 10_000),
        ([0, 4], 2, 10_000),
        ([1, 3], 4, 10_000),
        ([1, 3], 5, 7500),  # one and four
        ([], 1, 0),
    ],
)
def test_the_share_is_the_largest_that_fits_whole_into_the_nodes(cpus: list[float], workers: int, share: int) -> None:
    assert largest_equal_share([NodeCapacity.of(count, 0) for count in cpus], workers) == share


def test_ranks_go_to_the_smallest_node_that_holds_them_all() -> None:
    assert pack([learner(4)], gpus(8, 4, 2), WHERE) == {"learner": (1, 1, 1, 1)}


def test_ranks_that_no_node_holds_take_the_fewest() -> None:
    assert pack([learner(10)], gpus(2, 8, 4), WHERE) == {"learner": (1,) * 8 + (0,) * 2}


def test_replicas_spread_over_what_the_ranks_leave() -> None:
    places = pack([engines("rollout", 4), learner(2)], gpus(4, 4), WHERE)
    assert places == {"learner": (0, 0), "rollout": (1, 0, 1, 0)}


def test_ranks_part_where_an_engine_needs_the_whole_node() -> None:
    # On the fewest nodes, four and two, they would leave no node with four GPUs.
    places = pack([engines("teacher", 1, width=4), learner(6)], gpus(4, 4, 1, 1), WHERE)
    assert places == {"teacher": (0,), "learner": (1, 1, 1, 1, 2, 3)}


def test_wide_engines_take_what_narrow_ones_would_break_up() -> None:
    places = pack([engines("a", 1, width=4), engines("b", 1, width=8)], gpus(8, 8), WHERE)
    assert places == {"b": (0,), "a": (1,)}


def test_a_worker_without_room_is_named_with_what_it_needs() -> None:
    with pytest.raises(PlacementError, match=r"^teacher worker 1 needs 4 GPUs on one node, 3 are left; the end$"):
        pack([engines("teacher", 2, width=4)], gpus(4, 3), WHERE)


def test_cpus_beside_gpus_count_too() -> None:
    with pytest.raises(PlacementError, match=r"^rollout worker 2 needs 1 CPUs beside 1 GPUs on one node, and no node"):
        pack([engines("rollout", 3)], [NodeCapacity.of(cpus=2, gpus=8)], WHERE)
