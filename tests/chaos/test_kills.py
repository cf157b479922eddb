"""One run, from which one process of every kind is killed; `python -m benchmarks.cases.chaos` kills fifty."""

import random
import sys

import pytest

from benchmarks.cases.chaos import DISTURBED, chaos_run, outcome
from benchmarks.harness.kill_targets import DRIVER, KINDS, shares

STEPS = 14
OVERRIDES = (
    *DISTURBED,
    f"run.steps={STEPS}",
    "prompts.prompts_per_step=32",
    "checkpoint.every_steps=2",
    "evaluation.num_prompts=64",
    "learner.num_workers=2",
    "ray.dashboard=false",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_prompt_is_consumed_once_and_in_order_though_every_kind_of_process_is_killed() -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    sys.stdout.write(f"seed {seed}\n")  # pytest shows it when the test fails
    chance = random.Random(seed)
    with chaos_run(OVERRIDES) as run:
        for kind in shares(len(KINDS) + 1, chance):
            assert run.wait_for_step()
            run.disturb(kind, chance)
        found = outcome(run, OVERRIDES)
    assert run.killed == {**dict.fromkeys(KINDS, 1), DRIVER: 1}
    assert (found.steps, found.prompts) == (STEPS, STEPS * 32)
