"""Faults on the way of the weights to the rollout workers."""

from tests.faults.fault import Fault

FAULTS = (
    Fault(
        "last bucket lost",
        "cluster/weight_sync/manifest.py",
        "    if bucket:\n        yield tuple(bucket)\n",
        "",
        ("tests/cluster/weight_sync/test_manifest.py",),
    ),
    Fault(
        "tied head left as it was",
        "cluster/vllm/weight_sync/object_store.py",
        "self._tied_layers = tied_layers(self.model)",
        "self._tied_layers: list[Any] = []",
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_new_weights_reach_running_requests_and_leave_no_stale_prefix",
        ),
    ),
    Fault(
        "an expert that stays behind not noticed",
        "cluster/vllm/weight_sync/loading.py",
        "if info.load_numel < size:",
        "if not info.load_numel:",
        ("tests/cluster/vllm/weight_sync/test_loading.py",),
    ),
    Fault(
        "experts packed at the first load alone",
        "cluster/vllm/weight_sync/loading.py",
        "        method.moe_kernel = None\n",
        "        pass\n",
        ("tests/cluster/vllm/weight_sync/test_loading.py",),
    ),
    Fault(
        "router jitters while the learner trains",
        "learner/model/student.py",
        'or "jitter" in key ',
        "",
        ("tests/learner/model/test_checkpoint_format.py",),
    ),
    Fault(
        "prefix of old weights kept",
        "cluster/vllm/weight_sync/updates.py",
        'pause_scheduler_async(mode="keep", clear_cache=True)',
        'pause_scheduler_async(mode="keep", clear_cache=False)',
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_new_weights_reach_running_requests_and_leave_no_stale_prefix",
        ),
    ),
    Fault(
        "changes kept from values that were sent whole",
        "cluster/weight_sync/delta.py",
        "            kept[:] = new\n        if not has_base",
        "                kept[:] = new\n        if not has_base",
        ("tests/cluster/weight_sync/test_delta.py",),
    ),
    Fault(
        "changes applied to another base",
        "cluster/vllm/weight_sync/object_store.py",
        "message.base_version != self._kept_version:",
        "self._kept_version is None:",
        (
            "tests/rollout_workers/test_rollouts_on_vllm.py::test_changes_to_a_version_that_a_worker_does_not_hold_are_refused",
        ),
    ),
    Fault(
        "checksum of a worker not compared",
        "learner/weight_sync/object_store.py",
        "        if digest != sent:\n",
        "        if not digest:\n",
        ("tests/learner/weight_sync/test_object_store.py",),
    ),
    Fault(
        "same policy version taken twice",
        "rollout_workers/worker.py",
        "policy_version <= self._policy_version:",
        "policy_version < self._policy_version:",
        ("tests/rollout_workers/test_rollout_worker.py",),
    ),
    Fault(
        "restarted worker labelled with the first version",
        "learner/group.py",
        "        self._published_version = policy_version\n",
        "",
        (
            "tests/learner/batching/test_arriving_batches.py::test_a_worker_that_comes_late_gets_the_version_that_the_others_have",
        ),
    ),
    Fault(
        "next version begins a token late",
        "rollout_workers/trajectory_builder.py",
        "np.searchsorted(by_token, later)",
        'np.searchsorted(by_token, later, side="right")',
        ("tests/rollout_workers/test_trajectory_builder.py",),
    ),
)
