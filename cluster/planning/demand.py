"""What each step of a planned run asks for: the same lengths and teachers however the GPUs are shared out."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from cluster.contracts.config import Config
from cluster.contracts.interfaces import RolloutRequest
from cluster.planning.rates import Rates, draw
from cluster.planning.simulated_workers import Row

GOLDEN_RATIO = 0.618033988749895  # multiples of it, modulo 1, fill [0, 1) evenly
STEPS_AT_ONCE = 8  # whose lengths are drawn together: a step has its share of luck, all of them have little


class Demand:
    """Draws the trajectories of some steps when one of them is first asked for, from the run's seed alone."""

    def __init__(self, config: Config, rates: Rates, num_prompts: int | None = None) -> None:
        """Take the run, its rates, and how many prompts there are; None: none is asked twice."""
        self._config, self._rates, self._num_prompts = config, rates, num_prompts
        self._rows_per_step = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
        self._steps: dict[int, list[Row]] = {}
        shares = [rates.teachers[name].share for name in config.routes]
        self._until = [share / sum(shares) for share in accumulate(shares)]

    def requests(self, step: int) -> list[RolloutRequest]:
        """Return what a step asks for."""
        samples = self._config.rollout.samples_per_prompt
        return [
            RolloutRequest(row.trajectory_id, row.prompt_id, index % samples, seed=0)
            for index, row in enumerate(self._rows(step))
        ]

    def row(self, request: RolloutRequest) -> Row:
        """Return what becomes of a request."""
        step, index = divmod(request.trajectory_id, self._rows_per_step)
        return self._rows(step)[index]

    def tokens_per_step(self) -> tuple[float, float]:
        """Return the mean prompt and completion tokens of a step."""
        rows = [row for step in range(STEPS_AT_ONCE) for row in self._rows(step)]
        tokens = sum(row.prompt_tokens for row in rows), sum(row.completion_tokens for row in rows)
        return tokens[0] / STEPS_AT_ONCE, tokens[1] / STEPS_AT_ONCE

    def _rows(self, step: int) -> list[Row]:
        if step not in self._steps:
            self._draw(step // STEPS_AT_ONCE)
        return self._steps[step]

    def _draw(self, block: int) -> None:
        random = np.random.default_rng([self._config.run.seed, block])
        num_prompts, num_rows = self._config.prompts.prompts_per_step, self._rows_per_step
        prompts = draw(self._rates.rollout.prompt_tokens, STEPS_AT_ONCE * num_prompts, random)
        completions = draw(self._rates.rollout.completion_tokens, STEPS_AT_ONCE * num_rows, random)
        for index in range(STEPS_AT_ONCE):
            step = block * STEPS_AT_ONCE + index
            of_step = slice(index * num_prompts, (index + 1) * num_prompts)
            self._steps[step] = self._step(step, prompts[of_step], completions[index * num_rows :][:num_rows])

    def _step(self, step: int, prompts: Sequence[int], completions: Sequence[int]) -> list[Row]:
        samples, longest = self._config.rollout.samples_per_prompt, self._config.rollout.max_completion_tokens
        rows = []
        for index, completion_tokens in enumerate(completions):
            prompt = step * len(prompts) + index // samples
            prompt_id = prompt % self._num_prompts if self._num_prompts else prompt
            trajectory_id = step * self._rows_per_step + index
            teacher = self._teacher(prompt_id)
            rows.append(
                Row(trajectory_id, prompt_id, prompts[index // samples], min(completion_tokens, longest), teacher)
            )
        return rows

    def _teacher(self, prompt_id: int) -> str:
        position = (prompt_id * GOLDEN_RATIO) % 1.0
        routes = self._config.routes
        return next((name for name, until in zip(routes, self._until, strict=True) if position < until), routes[-1])
