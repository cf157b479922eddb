"""Faults of the memory plan."""

from tests.faults.fault import Fault

LIES, PLAN = ("tests/cluster/placement/test_memory.py",), ("tests/cluster/placement/test_memory_plan.py",)
FAULTS = (
    Fault(
        "an update of the weights loads no layer beside the one in use",
        "cluster/placement/memory.py",
        "_transfer_gib(config, size) + layer if on_gpu",
        "_transfer_gib(config, size) if on_gpu",
        LIES,
    ),
    Fault(
        "a teacher's engine leaves no room for its head",
        "cluster/placement/memory.py",
        "inside, outside = weights + head + activations + logits + context, sum(beside.values())",
        "inside, outside = weights + activations + logits + context, sum(beside.values())",
        LIES,
    ),
    Fault(
        "sleeping teachers of a slot take nothing",
        "cluster/placement/memory.py",
        "[others] = [len(names) - 1 for",
        "[others] = [0 for",
        LIES,
    ),
    Fault(
        "a tied embedding of a quantised model is counted twice",
        "cluster/models/model_size.py",
        "kept = self.head_parameters * (1 if self.is_tied else 2)",
        "kept = self.head_parameters * 2",
        LIES,
    ),
    Fault(
        "keys are shared out among more ranks than a layer has of them",
        "cluster/placement/memory.py",
        "/ min(max(1, engine.tensor_parallel), size.kv_heads)",
        "/ max(1, engine.tensor_parallel)",
        LIES,
    ),
    Fault(
        "norms of queries and keys keep nothing",
        "cluster/models/model_size.py",
        "        if self.norms_queries:",
        "        if False:",
        LIES,
    ),
    Fault(
        "a micro-batch is smaller than its longest trajectory",
        "cluster/placement/memory.py",
        "tokens = max(min(learner.forward_tokens, rows * longest), longest)",
        "tokens = min(learner.forward_tokens, rows * longest)",
        LIES,
    ),
    Fault(
        "a shared GPU is filled to the brim",
        "cluster/placement/memory_report.py",
        "SHARED_LIMIT = 0.95",
        "SHARED_LIMIT = 1.0",
        PLAN,
    ),
    Fault(
        "a setting of the run file is planned over",
        "cluster/placement/memory_plan.py",
        "    if recomputes is not None:",
        "    if False:",
        PLAN,
    ),
)
