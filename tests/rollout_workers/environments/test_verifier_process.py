import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from cluster.contracts.errors import ConfigError, RolloutError
from rollout_workers.environments.verifier_process import VerifierProcess, check_rewards
from rollout_workers.environments.verifiers import MATH_SECONDS
from tests.malformed.refusal import assert_sentence

OWN = "tests.rollout_workers.environments.own_rewards"


def rewards_in_a_thread(*cases: tuple[str, str, str]) -> list[float | None]:
    """Verify as an actor does: from an event loop that is not the main thread's."""
    rewards: list[float | None] = []

    async def verify_all() -> None:
        verifiers = {kind: VerifierProcess(kind) for kind, _, _ in cases}
        checks = [verifiers[kind].reward(completion, answer, "stop") for kind, completion, answer in cases]
        rewards.extend(await asyncio.gather(*checks))
        for verifier in verifiers.values():
            verifier.close()

    thread = threading.Thread(target=lambda: asyncio.run(verify_all()))
    thread.start()
    thread.join()
    return rewards


def reward_all(weights: Mapping[str, float], *cases: tuple[str, str | None], seconds: float = 30.0) -> tuple[Any, ...]:
    """Return the reward of each completion with its answer, or the error instead of it; and the metrics."""

    async def run() -> tuple[Any, ...]:
        process = VerifierProcess(weights, seconds)
        calls = [process.reward(text, answer, "stop", "four", {"level": 3}) for text, answer in cases]
        rewards = await asyncio.gather(*calls, return_exceptions=True)
        process.close()
        return (*rewards, {name: metric.value for name, metric in process.metrics().items()})

    return asyncio.run(run())


def test_every_verifier_gives_its_reward_away_from_the_main_thread() -> None:
    cases = [("exact", "a", "a"), ("regex", "abc", "a.c"), ("math", r"so $\frac{1}{2}$", "0.5"), ("math", "3", "4")]
    assert rewards_in_a_thread(*cases) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.timeout(20 * MATH_SECONDS)
def test_mathematics_that_takes_for_ever_is_wrong_and_the_next_completion_is_still_verified() -> None:
    endless = "$" + "9^{" * 6 + "9" + "}" * 6 + "$"
    assert rewards_in_a_thread(("math", endless, "4"), ("math", "$2+2$", "4")) == [0.0, 1.0]


def test_a_function_gets_prompt_completion_columns_and_how_the_completion_ended() -> None:
    # 4 letters, 10 times 2 letters, 100 times level 3, 1000 for a completion that stopped
    assert reward_all({f"{OWN}:columns_and_length": 1.0}, ("ab", None))[0] == 1324.0


def test_rewards_add_up_by_their_weights_and_a_verifier_without_an_answer_has_no_part() -> None:
    weights = {f"{OWN}:half": 0.5, "exact": 3.0}
    right, wrong, unknown, metrics = reward_all(weights, ("a", "a"), ("b", "a"), ("a", None))
    assert [right, wrong, unknown] == [3.25, 0.25, 0.25]
    assert metrics == {"rollout/reward_timeouts": 0.0}
    assert reward_all({"exact": 1.0, "regex": 1.0}, ("a", None)) == (None, {})


def test_a_call_that_takes_too_long_is_ended_and_counted_and_gives_no_reward() -> None:
    began = time.monotonic()
    weights = {f"{OWN}:half": 1.0, f"{OWN}:slow": 1.0}
    assert reward_all(weights, ("a", None), ("wait", None), ("a", None), seconds=4.0) == (
        1.5,
        None,
        1.5,
        {"rollout/reward_timeouts": 1.0},
    )
    assert time.monotonic() - began < 40


def test_what_is_no_finite_number_is_one_sentence_and_the_process_goes_on_after_its_end() -> None:
    cases = ("nan", "none", "text", "unknown", "exit", "nan")
    *errors, _ = reward_all({f"{OWN}:failing": 1.0}, *((case, None) for case in cases))
    says = (
        *(
            "returned nan; expected",
            "returned None; expected",
            "returned '0.5'; expected",
            "failed: KeyError: 'unknown'",
        ),
        *(f"ended in {OWN}:failing", "returned nan"),
    )
    for error, text in zip(errors, says, strict=True):
        assert isinstance(error, RolloutError)
        assert_sentence(str(error), text)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llm", "environment.rewards names 'llm'; expected exact, regex, math, or package.module:function"),
        ("absent_package:f", "'absent_package:f' as a reward cannot be imported"),
        (f"{OWN}:absent", "cannot be imported"),
        ("math:pi", "'math:pi' is no function"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rewards([name])
    assert_sentence(str(caught.value), says)
