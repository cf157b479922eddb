from collections.abc import Iterator

import pytest
import ray

from cluster.actors.cluster import RAY
from cluster.actors.object_store import STORE_ENVIRONMENT, add_environment, pack
from cluster.contracts.trajectory import make_generated
from cluster.contracts.wire import from_wire
from tests.builders import make_trajectory


@pytest.fixture
def maker(ray_cluster: None) -> Iterator[ray.actor.ActorHandle]:
    [actor] = RAY.create(
        "tests.cluster.actors.batch_maker:BatchMaker",
        ["maker"],
        [()],
        [add_environment({"num_cpus": 0}, STORE_ENVIRONMENT)],
    )
    yield actor
    RAY.shutdown([actor], timeout_seconds=5)


def test_the_handle_counts_what_the_bytes_hold() -> None:
    rows = [make_trajectory(trajectory_id=7), make_trajectory(trajectory_id=9, prompt=(1,), completion=(2, 3, 4, 5))]
    wire, handle = pack(make_generated(rows), {})
    assert from_wire(wire.joined()).num_rows == 2
    assert (handle.trajectory_ids, handle.num_tokens, handle.num_completion_tokens) == ((7, 9), (5, 5), (3, 4))


@pytest.mark.slow
def test_even_a_small_batch_stays_in_the_object_store(maker: ray.actor.ActorHandle) -> None:
    wire, handle = maker.make.options(num_returns=2).remote(1)
    ray.get(handle, timeout=60)
    # An object that Ray has sent to the driver inside a reply is on no node.
    assert ray.experimental.get_object_locations([wire])[wire]["node_ids"]


@pytest.mark.slow
def test_batches_outlive_the_worker_that_made_them(maker: ray.actor.ActorHandle) -> None:
    made = [maker.make.options(num_returns=2).remote(trajectory_id) for trajectory_id in range(50)]
    handles = ray.get([handle for _, handle in made], timeout=60)
    ray.kill(maker)
    batches = [from_wire(wire) for wire in ray.get([wire for wire, _ in made], timeout=60)]
    assert [batch["trajectory_id"][0].as_py() for batch in batches] == [h.trajectory_ids[0] for h in handles]


def test_variables_that_the_options_set_already_stay() -> None:
    option = {"num_cpus": 1, "runtime_env": {"env_vars": {"A": "theirs"}}}
    added = add_environment(option, {"A": "ours", "B": "ours"})
    assert added == {"num_cpus": 1, "runtime_env": {"env_vars": {"A": "theirs", "B": "ours"}}}
    assert option["runtime_env"]["env_vars"] == {"A": "theirs"}
