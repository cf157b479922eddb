"""Faults about teachers that are the student itself."""

from tests.faults.fault import Fault

LEARNER = "tests/learner/test_self_teachers.py"
DRIVER = "tests/cluster/run/test_self_teachers.py"
RUN_FILE = "tests/cluster/config/test_run_config.py"

FAULTS = (
    Fault(
        "an average that hardly keeps",
        "learner/self_teachers.py",
        "lerp_(master, ema)",
        "lerp_(master, 1 - ema)",
        (LEARNER,),
    ),
    Fault(
        "a copy that is the student",
        "learner/self_teachers.py",
        "[master.detach().clone() for master",
        "[master.detach() for master",
        (LEARNER,),
    ),
    Fault(
        "the student keeps its teacher's weights",
        "learner/engines/torch.py",
        "            yield\n        finally:\n            exchange(self._masters, weights)\n",
        "            yield\n        finally:\n",
        (LEARNER,),
    ),
    Fault(
        "a refresh overwrites the average",
        "learner/self_teachers.py",
        "if name not in self._ema:",
        "if name:",
        (LEARNER,),
    ),
    Fault(
        "every N steps is every step",
        "cluster/config/stages.py",
        "return step - step % (self.refresh.every or 1)",
        "return step",
        (RUN_FILE, DRIVER),
    ),
    Fault(
        "a resumed teacher takes the student of now",
        "cluster/run/self_teachers.py",
        "TeacherState()).version, takes_weights=False)",
        "TeacherState()).version, takes_weights=True)",
        (DRIVER,),
    ),
    Fault(
        "a gate opens for what is as good",
        "cluster/run/self_teachers.py",
        "not sign * value > sign * best",
        "not sign * value >= sign * best",
        (DRIVER,),
    ),
    Fault(
        "a batch begins during an update",
        "cluster/vllm/weight_sync/served_weights.py",
        "            await self._changed.wait_for(lambda: not self._is_updating)\n",
        "",
        ("tests/cluster/vllm/test_served_weights.py",),
    ),
    Fault(
        "an update begins during a batch",
        "cluster/vllm/weight_sync/served_weights.py",
        "            await self._changed.wait_for(lambda: not self._num_users)\n",
        "",
        ("tests/cluster/vllm/test_served_weights.py",),
    ),
    Fault(
        "a rank takes the rows of the head that are another's",
        "cluster/vllm/token_scoring.py",
        "values[self.shard.first : self.shard.first + len(to)]",
        "values[: len(to)]",
        ("tests/cluster/vllm/test_token_scoring.py",),
    ),
    Fault(
        "a ledger trusts any teacher version",
        "cluster/run/ledger.py",
        "for at in (step - config.rollout.max_staleness, step))",
        "for at in (0, step + 9))",
        ("tests/cluster/run/test_ledger.py",),
    ),
)
