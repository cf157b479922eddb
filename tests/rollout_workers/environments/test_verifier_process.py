import asyncio
import threading

import pytest

from rollout_workers.environments.verifier_process import VerifierProcess
from rollout_workers.environments.verifiers import MATH_SECONDS


def rewards_in_a_thread(*cases: tuple[str, str, str]) -> list[float]:
    """Verify as an actor does: from an event loop that is not the main thread's."""
    rewards: list[float] = []

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


def test_every_verifier_gives_its_reward_away_from_the_main_thread() -> None:
    cases = [("exact", "a", "a"), ("regex", "abc", "a.c"), ("math", r"so $\frac{1}{2}$", "0.5"), ("math", "3", "4")]
    assert rewards_in_a_thread(*cases) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.timeout(20 * MATH_SECONDS)
def test_mathematics_that_takes_for_ever_is_wrong_and_the_next_completion_is_still_verified() -> None:
    endless = "$" + "9^{" * 6 + "9" + "}" * 6 + "$"
    assert rewards_in_a_thread(("math", endless, "4"), ("math", "$2+2$", "4")) == [0.0, 1.0]
