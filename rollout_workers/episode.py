"""Runs one episode: the student samples and its environment answers, until an outcome or a limit ends it.

What the student samples is kept as the ids that it sampled, and what it reads is tokenised once: an episode is a row
that only grows. Where the student is to read what does not begin with a row's tokens, a further row begins.
"""

import asyncio
import math
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from numbers import Real
from time import monotonic
from typing import Self, TypeVar

import numpy as np

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.errors import PreceptorError, RolloutError
from cluster.contracts.protocols import Generator
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import FinishReason, GeneratedTrajectory, Ints, masked
from rollout_workers.environments.base import Agent, Environment, Observation, Outcome, Prompt, TokenIds
from rollout_workers.prompts import turn_seed
from rollout_workers.trajectory_builder import Segment, build_trajectory, failed_row, token_ids_of

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    """Bounds an episode, besides the sampling settings, whose tokens are those of all turns together; 0: no bound."""

    observation_tokens: int = 0  # that the environment may add to one prompt; 0: none may be added
    turns: int = 0
    turn_tokens: int = 0  # that one completion may have
    seconds: float = 0.0

    @classmethod
    def of(cls, settings: EnvironmentConfig) -> Self:
        return cls(
            settings.max_observation_tokens, settings.max_turns, settings.max_turn_tokens, settings.episode_seconds
        )


NO_LIMITS = Limits()


class LimitReached(Exception):
    """Says that an episode may sample no further completion, and what its finish reason is."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(f"the episode is over: {reason}")
        self.reason = reason


class Episode:
    """Samples the completions of one request, and holds the rows that they make."""

    def __init__(
        self,
        engine: Generator,
        request: RolloutRequest,
        prompt: Prompt,
        sampling: SamplingSettings,
        limits: Limits,
        priority: int,
        request_ids: Iterator[str],
        read_as: Ints | None = None,
    ) -> None:
        """Take the engine, what is requested of it, and ids for requests to it.

        The student reads `read_as`, if given, in the place of its prompt, which the rows have all the same.
        """
        self.prompt, self.num_turns = prompt, 0
        self._engine, self._request, self._sampling = engine, request, sampling
        self._limits, self._priority, self._request_ids = limits, priority, request_ids
        self._read_as = read_as
        self._tokens_left = sampling.max_completion_tokens
        self._longest_row = len(prompt.token_ids) + limits.observation_tokens + sampling.max_completion_tokens
        self._ends_at = monotonic() + limits.seconds if limits.seconds else float("inf")
        self._rows: list[list[Segment]] = []  # in turn, token ids that the student read and a completion
        self._first_turns: list[int] = []  # of each row
        self._lock = asyncio.Lock()  # an agent may ask for several completions at once

    @property
    def last(self) -> Completion:
        """Return the completion that was sampled last."""
        completion = self._rows[-1][-1]
        assert isinstance(completion, Completion)
        return completion

    async def run(self, environment: Environment | Agent) -> tuple[FinishReason, Observation | Outcome]:
        """Let the environment lead the episode to its end; return why it ended, and the answer that has the reward.

        At a limit that is "length", and the reward is the one that the last observation named. Any exception that is
        none of ours is the environment's: it has failed, as one has that alone takes as long as the episode may.
        """
        if isinstance(environment, Agent):
            try:
                outcome = await self._in_time(environment.run(self.prompt, self._request.seed, self.sample))
            except LimitReached as limit:
                return limit.reason, Outcome(None)
            return self.last.finish_reason if self._rows else "stop", _checked(outcome)
        opening = await self._in_time(environment.start(self.prompt, self._request.seed))
        answer: Observation | Outcome = Observation(opening)
        while isinstance(answer, Observation):
            try:
                completion = await self.sample(answer.token_ids, answer.is_whole)
            except LimitReached as limit:
                return limit.reason, answer
            answer = _checked(await self._in_time(environment.step(completion)))
        return completion.finish_reason, answer

    async def sample(self, token_ids: TokenIds, is_whole: bool = True) -> Completion:
        """Let the student read further tokens, and return the completion that it samples then.

        Args:
            token_ids: what it reads; with `is_whole` from the beginning on, the episode's completions included. Where
                these are not the tokens of a row, and more, a further row begins.
            is_whole: whether they are more than what follows the last completion.

        Raises:
            LimitReached: a limit of the episode allows no further completion.
            RolloutError: the tokens are more than the run file allows, or the engine gave up the request.
        """
        async with self._lock:
            given = np.asarray(token_ids, np.int32).reshape(-1)
            row, read = self._place(given) if is_whole else (len(self._rows) - 1, given)
            so_far = self._tokens(row) if row >= 0 else given[:0]
            self._check(len(so_far) + len(read), len(read))
            turn_tokens = min(self._tokens_left, self._limits.turn_tokens or self._tokens_left)
            completion = await self._generate(np.concatenate([so_far, read]), turn_tokens)
            # The row that was sampled from last is the last.
            self._rows.append([*(self._rows.pop(row) if row >= 0 else []), read, completion])
            self._first_turns.append(self._first_turns.pop(row) if row >= 0 else self.num_turns)
            self.num_turns += 1
            self._tokens_left -= len(completion.token_ids)
            return completion

    def rows(self, finish_reason: FinishReason, reward: float | None) -> list[GeneratedTrajectory]:
        """Return the episode's rows in the order of their first turns; the finish reason is that of the last sampled.

        An earlier row has its last completion's. All have the reward.
        """
        reasons = [segments[-1].finish_reason for segments in self._rows if isinstance(segments[-1], Completion)]
        reasons[-1] = finish_reason
        rows = sorted(zip(self._first_turns, self._rows, reasons, strict=True), key=lambda row: row[0])
        return [
            build_trajectory(self._request, self.prompt, segments, reason, reward, index, turn)
            for index, (turn, segments, reason) in enumerate(rows)
        ]

    def failed_rows(self, policy_version: int) -> list[GeneratedTrajectory]:
        """Return the rows of an episode whose environment failed, without anything to learn from.

        Without a completion, it is one row of the prompt, labelled with the policy version that is given.
        """
        rows = self.rows("environment_error", None) if self.num_turns else []
        failed = [replace(masked(row), finish_reason="environment_error") for row in rows]
        return failed or [failed_row(self._request, self.prompt, policy_version, self._sampling.num_candidates)]

    async def _generate(self, token_ids: Ints, max_tokens: int) -> Completion:
        try:
            return await self._engine.generate(
                next(self._request_ids),
                self._as_read(token_ids).tolist(),
                replace(self._sampling, max_completion_tokens=max_tokens),
                turn_seed(self._request.seed, self.num_turns),
                self._priority,
            )
        except PreceptorError:
            raise
        except Exception as error:  # which must not count as the environment's
            what = f"{type(error).__name__}: {error}"
            raise RolloutError(f"trajectory {self._request.trajectory_id}: the engine failed: {what}") from error

    def _as_read(self, token_ids: Ints) -> Ints:
        """Return a row's tokens with what the student reads in the place of the prompt."""
        if self._read_as is None:
            return token_ids
        count = len(self.prompt.token_ids)
        if not np.array_equal(token_ids[:count], self.prompt.token_ids):
            raise RolloutError(
                f"trajectory {self._request.trajectory_id}: the environment shows the student something else than the "
                "prompt, in whose place a privileged sampler reads; remove rollout.privileged"
            )
        return np.concatenate([self._read_as, token_ids[count:]])

    async def _in_time(self, answer: Awaitable[Answer]) -> Answer:
        """Wait for the environment; raise TimeoutError if it alone takes as long as an episode may."""
        if not isinstance(answer, Awaitable):
            raise TypeError(f"a method returned {type(answer).__name__} at once; its methods must be async")
        return await asyncio.wait_for(answer, self._limits.seconds or None)

    def _place(self, whole: Ints) -> tuple[int, Ints]:
        """Return the row that whole tokens go on with, the last that fits, and what of them is new; -1: none fits."""
        for row in reversed(range(len(self._rows))):
            so_far = self._tokens(row)
            if np.array_equal(whole[: len(so_far)], so_far):
                return row, whole[len(so_far) :]
        return -1, whole

    def _tokens(self, row: int) -> Ints:
        return np.concatenate([token_ids_of(segment) for segment in self._rows[row]])

    def _check(self, num_tokens: int, num_read: int) -> None:
        """Raise what keeps a row of so many tokens from a completion."""
        excess = num_tokens + self._tokens_left - self._longest_row
        if excess > 0 and not (self.num_turns and self._limits.observation_tokens):
            raise RolloutError(
                f"trajectory {self._request.trajectory_id}: the environment adds "
                f"{num_read if self.num_turns else num_read - len(self.prompt.token_ids)} tokens to the prompt, but "
                f"environment.max_observation_tokens = {self._limits.observation_tokens}; raise it"
            )
        if self.num_turns and self.last.finish_reason == "abort":
            raise LimitReached("abort")
        has_turns = not self._limits.turns or self.num_turns < self._limits.turns
        if excess > 0 or self._tokens_left <= 0 or not has_turns or monotonic() >= self._ends_at:
            raise LimitReached("length")


def _checked(answer: Observation | Outcome) -> Observation | Outcome:
    """Return what an environment answered; raise TypeError or ValueError if it is not what one may answer."""
    if not isinstance(answer, Observation | Outcome):
        raise TypeError(f"it answered {type(answer).__name__}; expected an Observation or an Outcome")
    reward = answer.reward
    if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
        raise ValueError(f"its reward is {reward!r}; expected a finite number, or None")
    return answer
