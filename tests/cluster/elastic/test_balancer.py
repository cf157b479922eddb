"""The balancer among a run's pools, which are scripted."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import PoolState
from cluster.contracts.files import RecordsFile
from cluster.elastic.balancer import MOVES, Balancer, make_balancer
from tests.builders import make_config
from tests.cluster.run.simulated_run import Load, Simulation

TEACHER_BOUND = Load(rows=96, slots=16, score_tokens_per_second=900)


@dataclass
class Pool:
    """Notes its sizes; new workers serve when `arrive` is called."""

    size: int
    serving: int = 0
    resized: list[int] = field(default_factory=list)
    restarts: int = 0

    def __post_init__(self) -> None:
        self.serving = self.size

    @property
    def staying(self) -> list[Any]:
        return []

    def resize(self, size: int) -> None:
        self.resized.append(size)
        self.size = size
        self.serving = min(self.serving, size)

    def arrive(self) -> None:
        self.serving = self.size

    def state(self) -> PoolState:
        return PoolState("pool", [f"worker-{index}" for index in range(self.serving)], self.size, self.restarts)


class Run:
    """A simulated run with a balancer, as the driver has it."""

    def __init__(self, config: Config, rollout: int = 4, teacher: int = 1) -> None:
        self.pools = {"rollout": Pool(rollout), "teachers.0": Pool(teacher)}
        self.directory = RunDirectory.create(config)
        share = SimpleNamespace(gpus_per_worker=0)
        pipeline: Any = SimpleNamespace(
            rollouts=self.pools["rollout"],
            teachers=SimpleNamespace(pools={"0": self.pools["teachers.0"]}),
            placement=SimpleNamespace(rollout=share, teachers={"0": share}),
            start_seconds=1.0,
        )
        self.said: list[str] = []
        run: Any = SimpleNamespace(
            config=config,
            pipeline=pipeline,
            directory=self.directory,
            view=SimpleNamespace(say=self.said.append),
            first_step=0,
        )
        balancer = make_balancer(run)
        assert balancer is not None
        self.balancer: Balancer = balancer
        self.simulation = Simulation(lambda _: TEACHER_BOUND)
        self.step = 0

    def sizes(self) -> dict[str, int]:
        return {name: pool.size for name, pool in self.pools.items()}

    def do(self, steps: int, arriving: bool = True) -> list[float]:
        """Do steps, and return how often workers had moved after each."""
        num_moves = []
        for _ in range(steps):
            self.step += 1
            record, batches = self.simulation.step(self.step, self.sizes())
            if arriving:
                for pool in self.pools.values():
                    pool.arrive()
            num_moves.append(self.balancer.after_step(self.step, record, batches)[MOVES])
        return num_moves


def balanced(folder: Path, *overrides: str) -> Config:
    teacher = ["run.steps=1000", "teachers.0.model=m", "rollout.engine.max_concurrent_sequences=16"]
    return make_config(f"run.directory={folder}", "balance=auto", *teacher, *overrides)


def test_it_is_off_unless_the_run_file_says_auto(tmp_path: Path) -> None:
    config = make_config(f"run.directory={tmp_path}")
    run: Any = SimpleNamespace(config=config, pipeline=None, directory=RunDirectory(tmp_path), first_step=0)
    assert make_balancer(run) is None


def test_workers_move_to_the_pool_that_holds_the_steps_up_and_everybody_is_told(tmp_path: Path) -> None:
    run = Run(balanced(tmp_path))
    num_moves = run.do(20)
    assert run.sizes() == {"rollout": 2, "teachers.0": 3}
    assert num_moves[-1] == len(run.pools["rollout"].resized) == 2
    moved = [found for found in RecordsFile(run.directory.moves).read() if found["moved"]]
    assert [found["step"] for found in moved] == [num_moves.index(number) + 1 for number in (1, 2)]
    assert moved[0]["sentence"].startswith("rollout 4 -> 3, teachers.0 1 -> 2: of a step's ")
    assert run.said[0] == f"balance: {moved[0]['sentence']}"


def test_a_step_in_which_a_worker_was_not_there_does_not_count(tmp_path: Path) -> None:
    run = Run(balanced(tmp_path, "balance.observe_steps=3", "balance.cooldown_steps=1"))
    run.do(1)
    run.pools["rollout"].serving = 3
    run.do(5, arriving=False)
    run.do(1)
    run.pools["rollout"].restarts = 1  # died and was back within a step
    run.do(3)
    assert run.sizes() == {"rollout": 4, "teachers.0": 1}
    run.do(1)
    assert run.sizes() == {"rollout": 3, "teachers.0": 2}


def test_who_runs_ahead_has_begun_the_next_steps_with_the_earlier_workers(tmp_path: Path) -> None:
    settings = ["rollout.max_staleness=2", "balance.observe_steps=3", "balance.cooldown_steps=1"]
    run = Run(balanced(tmp_path, *settings))
    run.do(5)
    assert run.sizes() == {"rollout": 4, "teachers.0": 1}
    run.do(1)  # the first, two more, and three that count
    assert run.sizes() == {"rollout": 3, "teachers.0": 2}


def test_what_preceptor_scale_sets_stays_until_it_was_observed(tmp_path: Path) -> None:
    run = Run(balanced(tmp_path))
    run.do(3)
    run.pools["rollout"].resize(3)
    run.pools["teachers.0"].resize(4)
    run.do(1)
    assert run.said == ["balance: observing anew, with rollout=3 teachers.0=4"]
    run.do(3)
    assert run.sizes() == {"rollout": 3, "teachers.0": 4}


@pytest.mark.parametrize("limit", ["rollout.min_workers=4", "teachers.0={model='m',max_workers=1}"])
def test_the_limits_of_the_run_file_hold(tmp_path: Path, limit: str) -> None:
    run = Run(balanced(tmp_path, "rollout.num_workers=4", limit))
    run.do(20)
    assert run.sizes() == {"rollout": 4, "teachers.0": 1}
