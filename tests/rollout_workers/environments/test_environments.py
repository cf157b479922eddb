"""Names of environments, and what every environment may use."""

import numpy as np
import pytest

from cluster.contracts.errors import ConfigError
from cluster.contracts.requests import Completion
from rollout_workers.environments.base import Services, SingleTurn, environment_named


def text_of(text: str, *stop: str) -> str:
    """Return what an environment reads of a completion whose tokens decode to `text`."""
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", np.zeros(1, np.int32))
    return Services(lambda text: [], lambda ids: text, stop=stop).text_of(completion)


def test_text_ends_before_the_earliest_stop_string() -> None:
    assert text_of(" 4 END 5 STOP", "STOP", "END") == "4"
    assert text_of(" 4 ") == "4"


def test_an_environment_has_a_name_or_an_import_path() -> None:
    assert environment_named("single_turn") is SingleTurn
    assert environment_named("rollout_workers.environments.base:SingleTurn") is SingleTurn


@pytest.mark.parametrize("kind", ["two_turns", "no_such_package.environments:Two"])
def test_any_other_name_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=kind):
        environment_named(kind)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("rollout_workers.prompts:PromptSet", "has neither start and step, nor run"),
        (
            "rollout_workers.environments.verifiers:is_exact",
            "cannot be made from the services alone: missing .*'answer'",
        ),
    ],
)
def test_what_is_no_environment_is_refused_before_anything_starts(kind: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"environment.kind: {kind} {sentence}"):
        environment_named(kind)
