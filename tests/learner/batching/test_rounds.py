from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batching.plan import Round, RoundPlanner

LENGTHS = st.lists(st.integers(1, 50), max_size=30)


def indices(rounds: list[Round]) -> list[int]:
    return [index for grids in rounds for grid in grids for row in grid for index in row]


@settings(deadline=None)
@given(arrivals=st.lists(LENGTHS, max_size=8), num_ranks=st.integers(1, 4), data=st.data())
def test_every_trajectory_stands_in_exactly_one_round_however_it_arrives(arrivals, num_ranks, data) -> None:
    planner = RoundPlanner(num_ranks, micro_batch_tokens=60)
    lengths: list[int] = []
    rounds: list[Round] = []
    for arrival in arrivals:
        planner.add(dict(enumerate(arrival, start=len(lengths))))
        lengths += arrival
        learner_is_idle = data.draw(st.booleans())
        rounds += planner.all_rounds() if learner_is_idle else planner.full_rounds()
    rounds += planner.all_rounds()
    assert sorted(indices(rounds)) == list(range(len(lengths)))
    for grids in rounds:
        assert len(grids) == num_ranks
        for grid in grids:
            longest = max((sum(lengths[index] for index in row) for row in grid), default=0)
            assert len(grid) * longest <= 60


def test_a_full_round_goes_out_before_the_step_is_complete() -> None:
    planner = RoundPlanner(num_ranks=1, micro_batch_tokens=8)
    planner.add({0: 4})
    assert planner.full_rounds() == []
    planner.add({1: 4, 2: 2})
    assert planner.full_rounds() == [(((0,), (1,)),)]
    assert planner.all_rounds() == [(((2,),),)]


def test_nothing_waiting_is_no_round() -> None:
    assert RoundPlanner(num_ranks=2, micro_batch_tokens=8).all_rounds() == []
