"""How the GPUs of a new run are divided among its pools."""

import pytest

from cluster.config.draft import TEACHER, Draft
from cluster.models.model_size import STUDENT
from cluster.placement.proposal import Machine, choose_hardware
from tests.cluster.placement.gpu_models import size


@pytest.mark.parametrize(
    ("student", "teacher", "gpus", "split"),
    [
        ("0.6B", "0.6B", 8, (5, 1, 2)),  # a teacher of this size reads many times faster than an engine writes
        ("0.6B", "4B", 8, (4, 2, 2)),
        ("8B", "32B", 8, (2, 2, 4)),
        ("4B", "32B", 16, (4, 8, 4)),  # reading takes twice as long as writing
        ("0.6B", "30B-A3B", 8, (4, 2, 2)),  # 3B of its parameters read a token
        ("0.6B", "70B", 8, (2, 2, 2)),  # each engine on two GPUs
    ],
)
def test_teachers_have_the_gpus_that_let_them_keep_up(
    student: str, teacher: str, gpus: int, split: tuple[int, int, int]
) -> None:
    draft = Draft()
    for field, value in (("student.model", "s"), (f"teachers.{TEACHER}.model", "t"), ("prompts.train", "p.jsonl")):
        draft.set(field, value)
    choose_hardware(draft, {STUDENT: size(student), TEACHER: size(teacher)}, 2048, Machine(64, 512, gpus, 80.0))
    config = draft.config()
    main = config.teachers[TEACHER]
    assert (config.rollout.num_workers, main.num_workers, config.learner.num_workers) == split
    used = config.rollout.num_workers + main.num_workers * main.engine.tensor_parallel + config.learner.num_workers
    assert used == gpus
