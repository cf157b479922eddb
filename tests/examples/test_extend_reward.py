"""The reward of one's own, in the process that runs it."""

import asyncio

from rollout_workers.environments.verifier_process import VerifierProcess, check_rewards

WEIGHTS = {"exact": 1.0, "examples.extend.reward:brevity": 0.2}


def test_a_short_right_answer_is_worth_more_than_a_long_one() -> None:
    check_rewards(WEIGHTS)

    async def rewards() -> list[float | None]:
        process = VerifierProcess(WEIGHTS)
        short = await process.reward("four", "four", "stop", "2 + 2?", {})
        long = await process.reward("4" * 80, "4" * 80, "stop", "2 + 2?", {})
        named = await process.reward("4" * 80, "5", "stop", "2 + 2?", {"enough": 20})
        process.close()
        return [short, long, named]

    # Both are right; 80 characters are twice what is enough, or four times what the row says.
    assert asyncio.run(rewards()) == [1.0 + 0.2, 1.0 + 0.2 * 0.5, 0.2 * 0.25]
