"""Environments of the package verifiers: on its stand-in, and on the package where VERIFIERS_PYTHON names its Python.

The package is in no lock, for it needs other versions of packages that are. `uv venv verifiers-env`, `uv pip install
--python verifiers-env/bin/python verifiers`; with VERIFIERS_PYTHON=verifiers-env/bin/python this file tests it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import ConfigError, PromptError
from rollout_workers.harness.environment import HarnessError
from rollout_workers.prompt_sources import read_rows
from tests.builders import make_config
from tests.malformed.refusal import assert_refused
from tests.rollout_workers.harness.driver import ScriptedEpisode, play

ROOT = Path(__file__).parents[3]
TASK = "preceptor_sums?num_tasks=3&seed=3"


@pytest.fixture(params=["stand-in", "installed"])
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the run file says of the Python that has the package."""
    if request.param == "stand-in":
        monkeypatch.syspath_prepend(str(ROOT / "examples" / "verifiers"))
        monkeypatch.syspath_prepend(str(ROOT / "tests" / "rollout_workers" / "stand_ins"))
        return {}
    if "VERIFIERS_PYTHON" not in os.environ:
        pytest.skip("VERIFIERS_PYTHON names no Python that has verifiers; the stand-in is tested")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples" / "verifiers"))
    return {"python": os.environ["VERIFIERS_PYTHON"]}


def rows(source: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    found = [row for _, row in read_rows(source, environment=EnvironmentConfig("verifiers", **settings))]
    return [row for row in found if isinstance(row, dict)]


def test_the_tasks_of_a_taskset_are_prompts(settings: dict[str, Any]) -> None:
    first, *others = rows(f"verifiers:{TASK}", settings)
    assert first == {
        "prompt": [{"role": "user", "content": "What is 3 + 9?"}],
        "answer": "12",
        "domain": "preceptor_sums",
        "verifiers_task": TASK,
        "verifiers_number": 0,
    }
    assert len(others) == 2
    assert len(rows(f"verifiers:{TASK}&limit=2", settings)) == 2


@pytest.mark.parametrize(("replies", "reward"), [(["It is 12"], 1.0), (["11", "12"], 0.5), (["11", "13"], 0.0)])
def test_the_environment_answers_and_its_reward_is_the_episodes(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], replies: list[str], reward: float
) -> None:
    episode = ScriptedEpisode(tokenizer, **settings)
    sampled = [[*episode.ids(reply), tokenizer.eos_token_id] for reply in replies]
    outcome = play(episode, *sampled, columns={"verifiers_task": TASK, "verifiers_number": 0})
    assert outcome.reward == reward
    row = episode.ids("<|im_start|>user\nWhat is 3 + 9?<|im_end|>\n<|im_start|>assistant\n") + sampled[0]
    if len(replies) == 2:
        answer = "That is wrong. Answer with the number alone."
        row += episode.ids(f"\n<|im_start|>user\n{answer}<|im_end|>\n<|im_start|>assistant\n") + sampled[1]
    assert episode.rows == [row]


def test_an_episode_that_fails_in_the_package_says_why(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
) -> None:
    episode = ScriptedEpisode(tokenizer, arguments={"no_such_setting": 1}, **settings)
    with pytest.raises(HarnessError, match=r"[Ee]xtra inputs are not permitted"):
        play(episode, [5], columns={"verifiers_task": TASK, "verifiers_number": 0})


def test_what_the_package_does_not_have_is_one_sentence(settings: dict[str, Any]) -> None:
    assert_refused(lambda: rows("verifiers:no_such_tasks", settings), PromptError, "verifiers:no_such_tasks: ")


def test_a_python_without_the_package_and_one_that_is_none_are_one_sentence() -> None:
    assert_refused(lambda: rows("verifiers:sums", {}), PromptError, "No module named 'verifiers'; this runs in ")
    nowhere = {"python": "/no/such/python"}
    assert_refused(lambda: rows("verifiers:sums", nowhere), ConfigError, "'/no/such/python', which cannot be run")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["environment.kind=verifiers"], "plays its own tasks: set kind = 'verifiers', and the prompts"),
        (["prompts.train=verifiers:sums"], "environment.kind is 'single_turn' and the prompts are 'verifiers:sums'"),
        (["environment.kind=harness"], "kind = 'harness' needs the import path of one"),
        (["environment.harness=agents:run"], "no other kind has any"),
        (["environment.python=python3"], "environment.python is for kind = 'harness' and 'verifiers'"),
        (
            ["environment.kind=harness", "environment.harness=agents:run", "prompts.template=raw"],
            "environment.kind = 'harness' asks by messages",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], says: str) -> None:
    assert_refused(lambda: make_config(*overrides), ConfigError, says)
