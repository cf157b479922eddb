"""Random episodes on a stub engine: the ids that were sampled are the ids of the rows."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import Ints, make_generated, ragged
from cluster.contracts.wire import from_wire, to_wire
from rollout_workers.environments.base import NewEnvironment, Observation, Outcome, Prompt, Services
from rollout_workers.episode import Limits
from rollout_workers.prompts import PromptSet
from rollout_workers.trajectory_builder import build_trajectory
from rollout_workers.worker import RolloutWorker

NUM_EPISODES = 1_000
LONGEST_COMPLETION = 6
SAMPLING = SamplingSettings(max_completion_tokens=60, temperature=1.0)
SERVICES = Services(lambda text: [], lambda ids: "")
PROMPTS = PromptSet.of_token_ids([[1, 2, 3], [4], [5, 6]], "main")


class StubModel:
    """A stub engine: random tokens, whose log-probabilities and number follow from the seed; notes what it sampled."""

    def __init__(self) -> None:
        self.sampled: dict[str, list[tuple[list[int], Completion]]] = {}  # by trajectory: what was read, what followed

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        random = np.random.default_rng(seed)
        count = min(int(random.integers(1, LONGEST_COMPLETION, endpoint=True)), sampling.max_completion_tokens)
        await asyncio.sleep(0)
        completion = Completion(
            random.integers(10, 50, count).astype(np.int32),
            random.normal(size=count).astype(np.float32),
            "stop" if random.random() < 0.9 else "length",
            np.full(count, 3, np.int32),
        )
        self.sampled.setdefault(request_id.partition("-")[0], []).append((list(prompt_ids), completion))
        return completion

    async def shutdown(self) -> None:
        """End nothing."""


class RandomAnswers:
    """Answers with random observations; now and then shows the whole of what was, or something else altogether."""

    def __init__(self, services: Services) -> None:
        self._tokens: list[int] = []

    async def start(self, prompt: Prompt, seed: int) -> Ints:
        self._random = np.random.default_rng(seed)
        self._tokens = prompt.token_ids.tolist()
        return prompt.token_ids

    async def step(self, completion: Completion) -> Observation | Outcome:
        self._tokens += completion.token_ids.tolist()
        if self._random.random() < 0.3:
            return Outcome(float(self._random.random()))
        read = self._random.integers(60, 99, self._random.integers(0, 4)).tolist()
        kind = self._random.integers(3)
        if kind == 2:  # forgets what was sampled first
            self._tokens = [7, *self._tokens[-3:], *read]
            return Observation(self._tokens, is_whole=True)
        self._tokens += read
        return Observation(self._tokens, is_whole=True) if kind else Observation(read)


def episodes(environment: NewEnvironment, count: int = NUM_EPISODES) -> tuple[list[dict[str, Any]], StubModel]:
    """Return all rows, in the order of episodes and turns, as they are read from the wire."""
    engine = StubModel()
    worker = RolloutWorker(engine, SERVICES, 16, environment, Limits(200))  # type: ignore[arg-type]
    worker.set_prompts(PROMPTS)
    requests = [RolloutRequest(index, index % 3, 0, seed=1_000 + index) for index in range(count)]

    async def collect() -> list[pa.RecordBatch]:
        return [from_wire(to_wire(batch)) async for batch, _, _ in worker.generate(requests, SAMPLING)]

    batches = asyncio.run(collect())
    together = [set(batch["episode_id"].to_pylist()) for batch in batches]
    assert sum(map(len, together)) == count  # all rows of an episode travel in one batch
    rows = []
    for batch in batches:
        lists = {name: ragged(batch, name) for name in ("token_ids", "loss_mask", "rollout_logprobs")}
        single = batch.select(["trajectory_id", "episode_id", "turn", "reward", "finish_reason"]).to_pylist()
        rows += [{**row, **{name: column[at] for name, column in lists.items()}} for at, row in enumerate(single)]
    return sorted(rows, key=lambda row: (row["episode_id"], row["turn"])), engine


def test_in_a_thousand_random_episodes_the_sampled_ids_are_the_trained_ids() -> None:
    rows, engine = episodes(RandomAnswers)
    assert {row["episode_id"] for row in rows} == set(range(NUM_EPISODES))
    assert len({row["trajectory_id"] for row in rows}) == len(rows) > 1.3 * NUM_EPISODES
    turns = 0
    for episode_id in range(NUM_EPISODES):
        own = [row for row in rows if row["episode_id"] == episode_id]
        sampled = engine.sampled[str(episode_id)]
        turns += len(sampled)
        trained = np.concatenate([row["token_ids"][row["loss_mask"] == 1] for row in own])
        assert trained.tolist() == np.concatenate([one.token_ids for _, one in sampled]).tolist()
        logprobs = np.concatenate([row["rollout_logprobs"] for row in own])
        assert logprobs.tolist() == np.concatenate([one.logprobs for _, one in sampled]).tolist()
        # Every completion stands in its row after exactly the tokens that the engine read for it.
        for row, following in zip(own, [*(row["turn"] for row in own[1:]), len(sampled)], strict=True):
            for read, one in sampled[row["turn"] : following]:
                assert row["token_ids"][: len(read) + len(one.token_ids)].tolist() == [*read, *one.token_ids]
            assert len(row["token_ids"]) == len(read) + len(one.token_ids)
    assert turns > 3 * NUM_EPISODES


class OneAnswer(RandomAnswers):
    async def step(self, completion: Completion) -> Outcome:
        return Outcome(0.5)


def test_an_environment_of_one_turn_makes_the_rows_of_the_plain_path_bit_for_bit() -> None:
    rows, engine = episodes(OneAnswer, count=50)
    for row in rows:
        [(read, completion)] = engine.sampled[str(row["episode_id"])]
        prompt = PROMPTS.prompt(row["episode_id"] % 3)
        assert read == prompt.token_ids.tolist()
        request = RolloutRequest(row["episode_id"], row["episode_id"] % 3, 0, 0)
        plain = make_generated(
            [build_trajectory(request, prompt, [prompt.token_ids, completion], completion.finish_reason, 0.5)]
        )
        for name in ("token_ids", "loss_mask", "rollout_logprobs"):
            assert ragged(plain, name)[0].tobytes() == row[name].tobytes()
        assert (row["turn"], row["trajectory_id"], row["reward"]) == (0, row["episode_id"], 0.5)
