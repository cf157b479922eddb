"""Prompts and rewards of reasoning-gym: against the package where it is installed, and against its stand-in.

The package is in no lock. `pip install reasoning-gym` and this file's tests run with it too.
"""

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import ConfigError, PromptError, RolloutError
from rollout_workers.environments.verifier_process import VerifierProcess, call_reward, check_rewards
from rollout_workers.prompt_sources import read_rows
from rollout_workers.reasoning_gym_tasks import ENTRY, TASK, dataset_of, entry_of, score
from tests.builders import make_config
from tests.malformed.refusal import assert_refused

SOURCE = "reasoning-gym:chain_sum?size=3&seed=7&max_terms=3"
STAND_INS = Path(__file__).parent / "stand_ins"


def forget() -> None:
    dataset_of.cache_clear()
    entry_of.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


@pytest.fixture(params=["stand-in", "installed"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    forget()
    if request.param == "stand-in":
        monkeypatch.syspath_prepend(str(STAND_INS))
    elif importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed; the stand-in is tested")
    yield str(request.param)
    forget()


def rows(source: str) -> list[dict[str, Any]]:
    found = [row for _, row in read_rows(source)]
    assert all(isinstance(row, dict) for row in found)
    return [row for row in found if isinstance(row, dict)]


def test_a_task_gives_the_same_rows_whenever_it_is_read(package: str) -> None:
    first = rows(SOURCE)
    assert len(first) == 3
    assert first[2] == {
        "prompt": first[2]["prompt"],
        "answer": first[2]["answer"],
        "domain": "chain_sum",
        TASK: "chain_sum?size=3&seed=7&max_terms=3",
        ENTRY: 2,
    }
    assert first[0]["prompt"].startswith("State the final answer to the following arithmetic problem: ")
    entry_of.cache_clear()
    assert rows(SOURCE) == first
    assert rows("reasoning-gym:chain_sum?size=3&seed=8&max_terms=3") != first
    [unseeded, zero] = [rows(f"reasoning-gym:chain_sum?size=1{seed}")[0]["prompt"] for seed in ("", "&seed=0")]
    assert unseeded == zero


def test_several_tasks_follow_one_another(package: str) -> None:
    joined = rows("reasoning-gym:chain_sum?size=2 + chain_sum?size=1&seed=5")
    assert [row[ENTRY] for row in joined] == [0, 1, 0]
    assert joined[2]["prompt"] == rows("reasoning-gym:chain_sum?size=1&seed=5")[0]["prompt"]


def test_the_tasks_own_scorer_gives_the_reward_in_the_process_of_verifiers(package: str) -> None:
    row = rows(SOURCE)[1]
    answer = row["answer"]
    columns = {name: row[name] for name in (TASK, ENTRY)}

    async def reward_all() -> list[float | None]:
        verifier = VerifierProcess(EnvironmentConfig(verifier="reasoning_gym").weights)
        cases = [
            (f"So <answer> {answer} </answer>", "stop"),
            (f" {answer}\n", "stop"),  # no tags: the whole completion
            (f"<answer>{answer}</answer>", "length"),  # cut off
            (f"<answer>{answer}{answer}xx</answer>", "stop"),  # the package's part of a point for more than the answer
            ("<answer>none</answer>", "stop"),
        ]
        found = [await verifier.reward(text, answer, reason, row["prompt"], columns) for text, reason in cases]
        verifier.close()
        return found

    length = len(answer)
    assert asyncio.run(reward_all()) == [1.0, 1.0, 0.0, length / (2 * length + 2), 0.0]


def test_an_entry_that_differs_between_nodes_is_refused(package: str) -> None:
    row = rows(SOURCE)[0]
    with pytest.raises(ValueError, match="asks something else in entry 0 here; install the same version"):
        score("another", "1", {TASK: row[TASK], ENTRY: 0, "finish_reason": "stop"})


def test_what_the_package_does_not_have_is_one_sentence(package: str) -> None:
    assert_refused(lambda: rows("reasoning-gym:chain_sums"), PromptError, "no task 'chain_sums'; there are chain_sum")
    wrong = "reasoning-gym:chain_sum?min_terms=4&max_terms=3"
    assert_refused(lambda: rows(wrong), PromptError, "max_terms must be >= min_terms")
    assert_refused(lambda: rows("reasoning-gym:chain_sum?terms=4"), PromptError, "unexpected keyword argument 'terms'")


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert_refused(lambda: rows(SOURCE), PromptError, "pip install reasoning-gym")
    forget()


def test_its_scorer_is_a_verifier_by_name_and_takes_its_own_prompts_alone() -> None:
    weights = EnvironmentConfig(rewards={"reasoning_gym": 0.5, "math": 1.0}).weights
    assert list(weights.values()) == [0.5, 1.0]
    check_rewards(weights)
    ours = f"prompts.train={SOURCE}"
    config = make_config("environment.verifier=reasoning_gym", ours, f"prompts.held_out={SOURCE}")
    assert config.reads_columns  # the task and the number of each entry
    assert config.environment.reward_name == "reward"
    assert_refused(
        lambda: make_config("environment.verifier=reasoning_gym", ours, "prompts.held_out=held_out.jsonl"),
        ConfigError,
        "'reasoning_gym' rewards the prompts of that package, and 'held_out.jsonl' are others",
    )


def test_a_scorer_that_fails_is_one_sentence() -> None:
    [path] = EnvironmentConfig(verifier="reasoning_gym").weights
    says = "the prompt is none of reasoning-gym's"
    assert_refused(lambda: call_reward(path, "1", "1", {"finish_reason": "stop"}), RolloutError, says)
