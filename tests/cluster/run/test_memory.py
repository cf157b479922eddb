"""A run plans its GPUs' memory before its workers are placed, and says what it has chosen."""

from pathlib import Path

import pytest

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.demo import EMBEDDED
from cluster.placement.placement import NodeResources, plan_placement
from cluster.run.inputs import Inputs, load_inputs
from cluster.run.memory import memory_plan, with_memory_plan

RUN_FILE = f"""
student.model = "{EMBEDDED / "student"}"
teachers.main.model = "{EMBEDDED / "teacher"}"
prompts.template = "raw"
rollout.max_completion_tokens = 48
ray.share_gpu = true
"""


@pytest.fixture
def run(tmp_path: Path) -> tuple[Config, Inputs]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "12 : 27 25 9 23 4 8 |", "answer": "42"}\n')
    config = parse_run_config(RUN_FILE, [f"prompts.train={prompts}"])
    return config, load_inputs(config)


def test_on_a_cpu_the_run_stays_as_it_is_and_nothing_is_said(run: tuple[Config, Inputs]) -> None:
    said: list[str] = []
    assert with_memory_plan(*run, None, said.append) is run[0]
    assert said == []
    assert memory_plan(*run, None).lines()[0].split()[-1] == "sum"  # `preceptor check` shows what the node must hold


def test_on_a_gpu_the_run_says_what_it_has_chosen_and_places_its_workers_so(run: tuple[Config, Inputs]) -> None:
    said: list[str] = []
    planned = with_memory_plan(*run, 24.0, said.append)
    assert said[0].startswith("learner: micro-batches of 16,384 tokens without gradient checkpointing")
    assert [line.split(":")[0] for line in said] == ["learner", "rollout", "teacher-main"]
    placement = plan_placement(planned, [NodeResources(8, 1)])
    assert placement.learner.gpus_per_worker == planned.learner.gpu_memory_fraction
    assert placement.rollout.gpus_per_worker == planned.rollout.engine.gpu_memory_fraction


def test_what_may_not_fit_is_said_and_no_stop(run: tuple[Config, Inputs]) -> None:
    said: list[str] = []
    with_memory_plan(*run, 4.0, said.append)
    assert said[-1].startswith("this may not fit: one GPU of 4 GiB does not hold the run: the learner takes about ")
