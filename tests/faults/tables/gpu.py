"""Faults in what was built for GPUs and is tested without one."""

from tests.faults.fault import Fault

KEEPS = "cluster/vllm/keep_cache.py"
KEPT = ("tests/cluster/vllm/test_keep_cache.py",)
MEETS = ("tests/cluster/weight_sync/test_joint_group.py",)

FAULTS = (
    Fault(
        "a prompt that waits shares what old weights computed",
        KEEPS,
        "if request.status != RequestStatus.RUNNING:",
        "if False:",
        KEPT,
    ),
    Fault(
        "a new prompt shares what old weights computed",
        KEEPS,
        "        self._set_apart(request)\n        vllms: Any = super()\n",
        "        vllms: Any = super()\n",
        KEPT,
    ),
    Fault(
        "kept caches are dropped after all",
        KEEPS,
        "if not self.running:",
        "if True:",
        KEPT,
    ),
    Fault(
        "a draw behind its block",
        "rollout_workers/candidates/sampled.py",
        ".minimum(last)",
        "",
        ("tests/rollout_workers/candidates/test_sampled.py",),
    ),
    Fault(
        "draws ignore the temperature",
        "rollout_workers/candidates/sampled.py",
        "of_tokens.div_(temperatures)",
        "of_tokens.div_(1.0)",
        ("tests/rollout_workers/candidates/test_sampled.py",),
    ),
    Fault(
        "micro-batches made one after the other",
        "learner/train_step.py",
        "            coming = thread.submit(make)\n            yield batch\n",
        "            yield batch\n            coming = thread.submit(make)\n",
        ("tests/learner/test_train_step.py",),
    ),
    Fault(
        "the last micro-batch not marked",
        "learner/train_step.py",
        "completes_step and number == num_batches",
        "completes_step and number == num_batches - 1",
        ("tests/learner/test_train_step.py",),
    ),
    Fault(
        "a learner with a GPU trains on the CPU",
        "learner/worker.py",
        'if gpu_ids and device.type == "cpu":',
        "if False:",
        ("tests/learner/test_worker.py::test_a_rank_that_has_a_gpu_does_not_train_on_the_cpu_in_silence",),
    ),
    Fault(
        "one thread beside a GPU",
        "cluster/placement/placement.py",
        'variables = {"OMP_NUM_THREADS": str(self.cpu_threads)}',
        'variables = {"OMP_NUM_THREADS": "1" if self.gpus_per_worker else str(self.cpu_threads)}',
        ("tests/cluster/placement/test_placement.py",),
    ),
    Fault(
        "an old driver is taken",
        "cluster/install/install.py",
        "< MIN_DRIVER:",
        "< 500:",
        ("tests/cluster/install/test_install.py",),
    ),
    Fault(
        "stage 1 in bfloat16 steps by the sum of all tokens",
        "learner/engines/zero.py",
        "                gradients.div_(divisor)\n",
        "                pass\n",
        ("tests/learner/engines/test_zero.py",),
    ),
    Fault(
        "ranks join before all have met",
        "cluster/weight_sync/joint_group.py",
        "arrived == self.world_size",
        "arrived > 1",
        MEETS,
    ),
    Fault(
        "a rank gives its group up in silence",
        "cluster/weight_sync/joint_group.py",
        "self._store.set(GIVEN_UP, reason)",
        "pass",
        MEETS,
    ),
    Fault(
        "a death while the group forms ends the learner's rank",
        "learner/weight_sync/gpu_update.py",
        "                self._link.give_up()\n",
        "                self._end()\n                self._link.give_up()\n",
        ("tests/learner/weight_sync/test_membership.py",),
    ),
    Fault(
        "a rank waits for ever in a group that was given up",
        "cluster/weight_sync/joint_group.py",
        "            abort()\n            return\n",
        "            return\n",
        MEETS,
    ),
    Fault(
        "what a broken group lost is not sent again",
        "learner/weight_sync/gpu_sender.py",
        "return not link.is_read_in_place and any(",
        "return not link.is_read_in_place and False and any(",
        ("tests/learner/weight_sync/test_membership.py",),
    ),
    Fault(
        "an update that never ended stays open",
        "cluster/vllm/weight_sync/updates.py",
        "        if self._update_is_open:\n",
        "        if False:\n",
        ("tests/cluster/vllm/weight_sync/test_nccl_and_ipc.py",),
    ),
    Fault(
        "a sorted row's places are those of the smallest",
        "cluster/models/token_scores.py",
        "bits[:, -k:].flip(-1)",
        "bits[:, :k]",
        ("tests/cluster/models/test_token_scores.py",),
    ),
)
