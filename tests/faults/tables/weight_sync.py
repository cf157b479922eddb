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
        "        self._published_version = policy_version\n        return report",
        "        return report",
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
    Fault(
        "a newcomer meets everyone in a new group at once",
        "learner/weight_sync/gpu_sender.py",
        "if come_later and worker not in self._known]",
        "if False]",
        ("tests/learner/weight_sync/test_membership.py",),
    ),
    Fault(
        "a newcomer never joins the group",
        "learner/weight_sync/gpu_sender.py",
        "self._known = [*(living or self._known), *new]",
        "self._known = [*(living or self._known)]",
        ("tests/learner/weight_sync/test_membership.py",),
    ),
    Fault(
        "weights by the object store are not held against the model outside the group",
        "cluster/vllm/weight_sync/nccl_and_ipc.py",
        "self._came_by_store = True",
        "self._came_by_store = False",
        ("tests/cluster/vllm/weight_sync/test_nccl_and_ipc.py",),
    ),
    Fault(
        "memory is shared that others cannot open",
        "learner/weight_sync/gpu_sender.py",
        'for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):',
        'for name in ("PYTORCH_ALLOC_CONF",):',
        ("tests/learner/weight_sync/test_gpu_links.py",),
    ),
    Fault(
        "buffers are lost in sleep",
        "cluster/vllm/sleep_calls.py",
        "values = {} if keeps_weights else not_in_updates(self.model_runner.model)",
        "values = {}",
        ("tests/rollout_workers/test_sleep_when_idle.py",),
    ),
    Fault(
        "an engine without weights writes",
        "rollout_workers/vllm_engine.py",
        "self._is_asleep, self._has_weights = True, False",
        "self._is_asleep, self._has_weights = True, True",
        ("tests/rollout_workers/test_sleep_when_idle.py",),
    ),
)
