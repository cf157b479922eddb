"""Plans the memory of a run on the GPUs of the connected cluster."""

from collections.abc import Callable

from cluster.config.run_config import Config
from cluster.models.model_size import model_sizes
from cluster.placement.gpus import smallest_gpu
from cluster.placement.memory import Lengths
from cluster.placement.memory_plan import plan_memory
from cluster.placement.memory_report import MemoryPlan
from cluster.placement.placement import cluster_nodes
from cluster.run.inputs import Inputs


def cluster_gpu() -> float | None:
    """Return the GiB of the smallest GPU of the connected cluster; None: it has none."""
    return smallest_gpu([node.node_id for node in cluster_nodes() if node.gpus])


def memory_plan(config: Config, inputs: Inputs, gpu_gib: float | None) -> MemoryPlan:
    """Plan for GPUs of so many GiB or, with None, for CPUs."""
    sizes = model_sizes(config, skips_unknown=True)  # vLLM may know a teacher's model all the same
    lengths = Lengths(inputs.max_model_len, inputs.scoring_model_len, inputs.rollout_model_len(config))
    return plan_memory(config, sizes, lengths, gpu_gib)


def with_memory_plan(config: Config, inputs: Inputs, gpu_gib: float | None, say: Callable[[str], None]) -> Config:
    """Return the run with what its file leaves open of its GPUs' memory; without GPUs, as it is.

    What may not fit is said, and the run starts all the same: the plan's sums are those of the largest arrays.
    """
    if gpu_gib is None:
        return config
    plan = memory_plan(config, inputs, gpu_gib)
    for line in (*plan.choices, *([] if plan.fault is None else [f"this may not fit: {plan.fault}"])):
        say(line)
    return plan.config
