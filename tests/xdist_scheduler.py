"""How `pytest -n` spreads tests over processes: by file, those that take long first."""

try:
    from xdist.scheduler import LoadFileScheduling
except ImportError:  # as on a GPU machine that is there for minutes
    LoadFileScheduling = object

# Files that share what takes long to start: the process that has it does all of them.
TOGETHER = {
    # One run of the embedded models.
    "the short run": (
        "end_to_end/test_training.py",
        "end_to_end/test_what_is_seen.py",
        "end_to_end/test_endings.py",
        "end_to_end/test_verify.py",
    ),
    # The pools of one run.
    "the pipeline": ("end_to_end/pipeline/test_strict_streaming.py", "end_to_end/pipeline/test_supports.py"),
    # Three teachers.
    "the teachers": (
        "teacher_workers/audit/test_runner_on_vllm.py",
        "teacher_workers/test_shared_prompts_on_vllm.py",
        "teacher_workers/test_scores_on_vllm.py",
        "teacher_workers/test_tensor_parallel_on_vllm.py",
    ),
    # One pool of two rollout actors.
    "the rollouts": (
        "rollout_workers/test_rollouts_on_vllm.py",
        "rollout_workers/candidates/test_candidates_on_vllm.py",
        "examples/test_extend_weight_payload.py",
    ),
}
# What starts engines or clusters, the longest first, so that no process is left with one at the end; then all others,
# in the order in which they were collected.
FIRST = (
    *TOGETHER["the short run"],
    "learner/test_group.py",
    "learner/checkpointing/test_training_state.py",
    "cluster/jobs/test_submit.py",
    *TOGETHER["the rollouts"],
    *TOGETHER["the teachers"],
    "end_to_end/",
    "examples/test_extend_in_a_run.py",
    "_on_vllm.py",
    "examples/test_extend_environment.py",
    "cluster/placement/test_placed_actors.py",
    "benchmarks/test_gpu_first.py",
    "rollout_workers/test_failover.py",
    "rollout_workers/test_resize.py",
    "teacher_workers/test_failover.py",
    "cluster/nodes/test_ray_session.py",
    "cluster/install/test_install.py",
    "learner/checkpointing/test_checkpoints_beside_training.py",
    "learner/engines/test_zero.py",
    "cluster/vllm/weight_sync/test_object_store.py",
    "teacher_workers/test_replacement.py",
    "teacher_workers/audit/test_runner.py",
    "learner/batching/test_arriving_batches.py",
    "cluster/run/test_preflight.py",
)


class ByFile(LoadFileScheduling):
    """Keeps the tests of a file in one process, for its fixtures, and so those of files that share one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return next((scope for scope, files in TOGETHER.items() if file.endswith(files)), str(file))


def place(nodeid: str) -> int:
    """Return how early a test is begun: the lower, the earlier."""
    file = nodeid.split("::", maxsplit=1)[0]
    return next((number for number, part in enumerate(FIRST) if part in file), len(FIRST))
