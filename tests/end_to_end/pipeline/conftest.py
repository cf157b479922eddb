"""The pools of one run, shared by the tests that drive them themselves."""

from collections.abc import Iterator

import pytest

from cluster.demo import embedded_config
from cluster.placement.placement import cluster_nodes, plan_placement
from cluster.run.inputs import load_inputs
from cluster.run.pools import Pipeline, start_pipeline


@pytest.fixture(scope="package")  # it ends with this folder: its actors have the names that others would give theirs
def pipeline(ray_cluster: None) -> Iterator[Pipeline]:
    """Run real pools of the embedded pair that serve every support, with a learner of exact divergences."""
    small = ("run.steps=3", "rollout.rows_per_batch=4", "learner.micro_batch_tokens=256", "learner.warmup_steps=0")
    draws, exact = (embedded_config([f"objective.preset={name}", *small]) for name in ("async-opd", "gkd"))
    inputs = load_inputs(draws)
    with start_pipeline(draws, inputs, plan_placement(draws, cluster_nodes()), learner_config=exact) as running:
        yield running
