"""Gives the student a second try: a wrong first answer is followed by a hint, and the second answer is rewarded.

[environment]
kind = "examples.extend.two_turn_environment:SecondTry"
verifier = "regex"
max_observation_tokens = 2
"""

from cluster.contracts.requests import Completion
from cluster.contracts.trajectory import Ints
from rollout_workers.environments.base import Observation, Outcome, Prompt, Services

HINT = "x |"  # in Countdown's words: that was a miss, answer again


class SecondTry:
    """Answers one trajectory; rewards what the run's verifier finds right at the first or the second try."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._is_second_try = False

    async def start(self, prompt: Prompt, seed: int) -> Ints:
        """Return the prompt as it is; nothing here is random, so the seed has no use."""
        self._prompt = prompt
        return prompt.token_ids

    async def step(self, completion: Completion) -> Observation | Outcome:
        """Reward a right or a second answer, else give the hint."""
        reward = await self._services.reward(self._prompt, completion)
        if reward or self._is_second_try:
            return Outcome(reward)
        self._is_second_try = True
        return Observation(self._services.encode(HINT), reward)
