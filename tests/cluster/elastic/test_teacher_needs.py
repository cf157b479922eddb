from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.elastic.scale import make_scaling, need_of
from cluster.run.inputs import Inputs
from rollout_workers.prompts import PromptOrder, PromptSet
from tests.builders import make_config

# Six prompts in the order of the file, two to a step: steps 1, 2 and 4 are main's, step 3 is code's.
OVERRIDES = ("teachers.code={model='c'}", "prompts.prompts_per_step=2", "prompts.shuffle=false", "run.steps=3")


def make_inputs(held_out_ids: tuple[int, ...] = ()) -> Inputs:
    of = PromptSet.of_token_ids
    prompts = PromptSet.join([of([[1]] * 4, "main"), of([[1]] * 2, "code")])
    return Inputs(prompts, PromptOrder(6, seed=0, shuffle=False), held_out_ids, max_model_len=8)


def config(*overrides: Any) -> Config:
    return make_config(*OVERRIDES, *overrides)


@pytest.mark.parametrize(
    ("teacher", "next_step", "found"),
    [
        ("main", 0, "step 1 asks prompts that teacher main scores"),
        ("main", 1, "step 2 asks prompts that teacher main scores"),
        ("main", 2, None),
        ("code", 0, "step 3 asks prompts that teacher code scores"),
        ("code", 3, None),
    ],
)
def test_a_teacher_is_needed_while_steps_to_come_ask_its_prompts(
    teacher: str, next_step: int, found: str | None
) -> None:
    assert need_of([teacher], config(), make_inputs(), next_step) == found


def test_the_next_epoch_needs_them_again() -> None:
    found = need_of(["main"], config("run.steps=4"), make_inputs(), next_step=2)
    assert found == "step 4 asks prompts that teacher main scores"


def test_a_teacher_in_everybodys_target_is_needed_by_every_route() -> None:
    bases = ("teachers.main.base=base-model", "teachers.code.base=base-model")
    found = need_of(
        ["base-model"],
        config("objective=direct-opd", "teachers.base-model={model='b'}", *bases),
        make_inputs(),
        next_step=2,
    )
    assert found == "step 3 asks prompts that teacher base-model scores"


def test_of_a_slot_any_teacher_may_be_needed() -> None:
    assert need_of(["main", "code"], config(), make_inputs(), 2) == "step 3 asks prompts that teacher code scores"


def test_held_out_prompts_need_their_teachers_to_the_end() -> None:
    found = need_of(["main"], config(), make_inputs(held_out_ids=(1,)), next_step=2)
    assert found == "held-out prompts are scored by teacher main"


@pytest.mark.parametrize(("first_step", "size"), [(2, 2), (3, 0)])
def test_a_drained_teacher_is_brought_back_where_the_run_goes_back_to_steps_that_need_it(
    first_step: int, size: int, tmp_path: Path
) -> None:
    of_run, said = config("teachers.code.num_workers=2"), []
    pools = {name: Sizes(0 if name == "code" else 1) for name in of_run.teachers}
    pipeline: Any = SimpleNamespace(
        rollouts=Sizes(1),
        teachers=SimpleNamespace(pools=pools),
        placement=SimpleNamespace(rollout=None, teachers={"main": None, "code": None}),
    )
    run: Any = SimpleNamespace(
        config=of_run,
        inputs=make_inputs(),
        pipeline=pipeline,
        directory=RunDirectory(tmp_path),
        ledger=SimpleNamespace(finished_step=first_step),
        view=SimpleNamespace(say=said.append),
        is_first_attempt=True,
    )
    make_scaling(run)
    assert (pools["code"].size, pools["main"].size) == (size, 1)
    assert said == ["teachers.code=2 again: step 3 asks prompts that teacher code scores"] * (size > 0)


class Sizes:
    """A pool that changes its size at once."""

    def __init__(self, size: int) -> None:
        self.size = size

    def resize(self, size: int) -> None:
        self.size = size


def test_a_teacher_that_writes_is_needed_by_every_step() -> None:
    privileged = (
        "rollout.privileged={template='{{ prompt }} {{ hint }}',sampler='writer'}",
        "teachers.writer={model='w',backend='vllm-generate'}",
        "objective.terms.main.importance.kind=truncated",
    )
    run = config("objective=thinking-machines", *privileged)
    found = need_of(["writer"], run, make_inputs(), next_step=2)
    assert found == "teacher writer writes for prompts that the student never solves"
    assert need_of(["main"], run, make_inputs(), next_step=2) is None
