"""When the workers of a replaced teacher leave whose place another is to take."""

from pathlib import Path

import pytest

from cluster.actors.cluster import PoolTimeouts
from cluster.config.run_directory import RunDirectory
from teacher_workers.pool import TeacherPool
from teacher_workers.replacement import Replacement
from tests.cluster.run.test_hooks import config_in, finish, make_run


class Workers:
    """Stands for a pool of teacher replicas."""

    label = "workers"
    size = 1

    def resize(self, size: int) -> None:
        self.size = size


@pytest.mark.parametrize(("entered", "num_old"), [(3, 0), (4, 1)])
def test_a_teacher_whose_place_is_taken_leaves_before_a_step_waits_for_the_new_one_and_no_earlier(
    tmp_path: Path, entered: int, num_old: int
) -> None:
    config = config_in(tmp_path)
    run, _ = make_run(RunDirectory.create(config), config)
    finish(run, range(1, 4), truncated_ratio=0.0)
    teachers, old, new = run.context.pipeline.teachers, Workers(), Workers()
    pools = [TeacherPool("main", workers, PoolTimeouts(1, 1)) for workers in (old, new)]  # type: ignore[arg-type]
    teachers.pools["main"] = pools[0]
    teachers.prepare(replacement := Replacement({"main": pools[1]}, waits_for_place=True))
    teachers.switch(replacement, entered)
    run.hooks.before_step(entered)  # step 3, from 0, is the next to be learned from
    assert (old.size, new.size) == (num_old, 1)
