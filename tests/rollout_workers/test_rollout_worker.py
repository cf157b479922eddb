"""The rollout worker on a scripted engine."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.contracts.errors import RolloutError, WeightSyncError
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import Ints, ragged, row_id
from rollout_workers import episode
from rollout_workers.environments.base import NewEnvironment, Observation, Outcome, Prompt, Services
from rollout_workers.episode import LimitReached, Limits
from rollout_workers.prompts import turn_seed
from rollout_workers.worker import MOST_FAILURES, RolloutWorker
from tests.rollout_workers.deployment import make_prompts

SAMPLING = SamplingSettings(max_completion_tokens=8, temperature=1.0)
SERVICES = Services(lambda text: [], lambda ids: " ".join(f"w{token}" for token in ids))


class Asking:
    """Answers the first `num_turns` completions with the observation 7, 8, and rewards the next with 0.5."""

    num_turns = 1

    def __init__(self, services: Services) -> None:
        self._num_seen = 0

    async def start(self, prompt: Prompt, seed: int) -> Ints:
        return prompt.token_ids

    async def step(self, completion: Completion) -> Observation | Outcome:
        self._num_seen += 1
        return Observation([7, 8], reward=0.25) if self._num_seen <= self.num_turns else Outcome(0.5)


class Endless(Asking):
    num_turns = 1_000


class Failing(Asking):
    async def step(self, completion: Completion) -> Observation | Outcome:
        raise KeyError("no tool")


class ScriptedEngine:
    """Samples `seed` tokens of value 50, at most `longest`, after as many turns of the event loop; fails for seed 0."""

    def __init__(self, longest: int = 1_000) -> None:
        self.longest = longest
        self.request_ids: list[str] = []
        self.asked: list[tuple[list[int], int, int]] = []  # token ids, most tokens to sample, seed
        self.priorities: list[int] = []
        self.events: list[str] = []

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        self.request_ids.append(request_id)
        self.priorities.append(priority)
        self.asked.append((list(prompt_ids), sampling.max_completion_tokens, seed))
        seed = min(seed, self.longest)
        if seed == 0:
            raise RolloutError("request given up")
        for _ in range(seed):
            await asyncio.sleep(0)
        versions = np.arange(4, 4 + seed, dtype=np.int32)
        return Completion(np.full(seed, 50, np.int32), np.full(seed, -1.0, np.float32), "stop", versions)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        self.events.append("init")

    async def start_weight_update(self) -> None:
        self.events.append("start")

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        self.events.append("update")

    async def finish_weight_update(self, policy_version: int) -> str:
        return f"checksum-{policy_version}"

    async def shutdown(self) -> None:
        self.events.append("shutdown")


def rollout(
    environment: NewEnvironment, max_observation_tokens: int, longest: int, **limits: Any
) -> tuple[Any, ScriptedEngine]:
    """Return a row of prompt 0, whose tokens are 10 to 19, each completion having `longest` tokens."""
    engine = ScriptedEngine(longest)
    worker = RolloutWorker(engine, SERVICES, 2, environment, Limits(max_observation_tokens, **limits))
    worker.set_prompts(make_prompts())
    [batch] = asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=9)]))
    return batch, engine


def test_an_observation_follows_the_completion_that_it_answers_and_is_not_trained_on() -> None:
    batch, engine = rollout(Asking, max_observation_tokens=2, longest=2)
    prompt = list(range(10, 20))
    assert ragged(batch, "token_ids")[0].tolist() == [*prompt, 50, 50, 7, 8, 50, 50]
    assert ragged(batch, "loss_mask")[0].tolist() == [0] * 10 + [1, 1, 0, 0, 1, 1]
    assert ragged(batch, "rollout_logprobs")[0].tolist() == [-1] * 4
    assert (batch["reward"][0].as_py(), batch["finish_reason"][0].as_py()) == (0.5, "stop")
    # The engine reads everything so far, may sample what is left of 8 tokens, and has a seed of its own each turn.
    assert engine.asked == [(prompt, 8, 9), ([*prompt, 50, 50, 7, 8], 6, turn_seed(9, 1))]
    assert len(set(engine.request_ids)) == 2


def test_the_tokens_that_may_be_sampled_are_those_of_all_turns_together() -> None:
    batch, _ = rollout(Endless, max_observation_tokens=100, longest=4)
    assert ragged(batch, "loss_mask")[0].tolist() == [0] * 10 + [1] * 4 + [0] * 2 + [1] * 4
    assert (batch["reward"][0].as_py(), batch["finish_reason"][0].as_py()) == (0.25, "length")


def test_an_observation_that_does_not_fit_ends_the_trajectory_before_it() -> None:
    batch, _ = rollout(Endless, max_observation_tokens=3, longest=1)
    assert ragged(batch, "loss_mask")[0].tolist() == [0] * 10 + [1, 0, 0, 1]
    assert (batch["reward"][0].as_py(), batch["finish_reason"][0].as_py()) == (0.25, "length")


def test_an_observation_needs_room_in_the_run_file() -> None:
    with pytest.raises(RolloutError, match=r"adds 2 tokens .*max_observation_tokens = 0; raise it"):
        rollout(Asking, max_observation_tokens=0, longest=1)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (0.5, "it answered float; expected an Observation or an Outcome"),
        (None, "it answered NoneType; expected"),
        (Outcome(float("nan")), "its reward is nan; expected a finite number, or None"),
        (Outcome("0.5"), "its reward is '0.5'; expected"),  # type: ignore[arg-type]
        (Observation([7], reward=float("inf")), "its reward is inf; expected"),
    ],
)
def test_an_answer_that_is_none_is_the_environments_failure(caplog: Any, answer: Any, sentence: str) -> None:
    class Wrong(Asking):
        async def step(self, completion: Completion) -> Observation | Outcome:
            return answer  # type: ignore[no-any-return]

    batch, _ = rollout(Wrong, max_observation_tokens=2, longest=3)
    assert f"the environment failed: {sentence}" in caplog.text.replace("TypeError: ", "").replace("ValueError: ", "")
    assert batch["finish_reason"][0].as_py() == "environment_error"


def test_an_environment_whose_methods_are_not_async_is_told_so(caplog: Any) -> None:
    class Plain(Asking):
        def step(self, completion: Completion) -> Outcome:  # type: ignore[override]
            return Outcome(1.0)

    rollout(Plain, max_observation_tokens=2, longest=3)
    assert "TypeError: a method returned Outcome at once; its methods must be async" in caplog.text


def test_an_environment_that_fails_leaves_a_row_without_anything_to_learn_from(caplog: Any) -> None:
    batch, _ = rollout(Failing, max_observation_tokens=2, longest=3)
    assert "trajectory 0: the environment failed: KeyError: 'no tool'" in caplog.text
    assert (batch["finish_reason"][0].as_py(), batch["reward"][0].as_py()) == ("environment_error", None)
    assert ragged(batch, "token_ids")[0].tolist() == [*range(10, 20), 50, 50, 50]
    assert not ragged(batch, "loss_mask").values.any()
    assert not len(ragged(batch, "rollout_logprobs").values)
    assert (batch["min_policy_version"][0].as_py(), batch["max_policy_version"][0].as_py()) == (4, 4)


def make_worker(rows_per_batch: int = 2) -> tuple[RolloutWorker, ScriptedEngine]:
    engine = ScriptedEngine()
    worker = RolloutWorker(engine, SERVICES, rows_per_batch)
    worker.set_prompts(make_prompts())
    return worker, engine


async def collect(worker: RolloutWorker, requests: Sequence[RolloutRequest]) -> list[pa.RecordBatch]:
    return [batch async for batch, _metrics, _is_last in worker.generate(requests, SAMPLING)]


def test_batches_are_filled_in_the_order_of_completion_and_never_mix_teachers() -> None:
    worker, _ = make_worker()
    # Even prompts go to one teacher, odd ones to the other; a larger seed takes longer.
    requests = [
        RolloutRequest(index, prompt, 0, seed) for index, (prompt, seed) in enumerate([(0, 9), (2, 3), (1, 1), (4, 6)])
    ]
    batches = asyncio.run(collect(worker, requests))
    assert [batch["trajectory_id"].to_pylist() for batch in batches] == [[1, 3], [2], [0]]
    assert [set(batch["teacher"].to_pylist()) for batch in batches] == [{"even"}, {"odd"}, {"even"}]


def test_only_a_prompt_with_an_answer_is_rewarded() -> None:
    worker, _ = make_worker(rows_per_batch=1)
    requests = [RolloutRequest(0, 0, 0, seed=1), RolloutRequest(1, 2, 0, seed=2), RolloutRequest(2, 1, 0, seed=3)]
    batches = asyncio.run(collect(worker, requests))
    assert [batch["reward"][0].as_py() for batch in batches] == [1.0, 0.0, None]  # "w50" is right, "w50 w50" is not


def test_a_row_holds_its_prompt_and_completion() -> None:
    worker, _ = make_worker()
    [batch] = asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=2)]))
    assert ragged(batch, "token_ids")[0].tolist() == [*range(10, 20), 50, 50]


def test_the_same_trajectory_asked_twice_has_two_request_ids() -> None:
    worker, engine = make_worker()
    asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=1)] * 2))
    assert len(set(engine.request_ids)) == 2


def test_a_failed_request_ends_the_call() -> None:
    worker, _ = make_worker()
    with pytest.raises(RolloutError, match="given up"):
        asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=5), RolloutRequest(1, 0, 1, seed=0)]))


def test_a_row_carries_the_versions_that_the_engine_names() -> None:
    worker, _ = make_worker()
    [batch] = asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=3)]))
    assert (batch["min_policy_version"][0].as_py(), batch["max_policy_version"][0].as_py()) == (4, 6)
    assert batch["version_changes"][0].as_py() == [1, 2]


def test_the_engine_is_told_the_priority_of_every_request() -> None:
    worker, engine = make_worker()

    async def scenario() -> None:
        requests = [RolloutRequest(0, 0, 0, seed=1), RolloutRequest(1, 0, 1, seed=1)]
        [_ async for _ in worker.generate(requests, SAMPLING, priority=7)]

    asyncio.run(scenario())
    assert engine.priorities == [7, 7]


def test_the_first_update_may_set_any_version_and_later_ones_only_go_forward() -> None:
    worker, _ = make_worker()
    assert asyncio.run(worker.finish_weight_update(7)) == "checksum-7"
    assert asyncio.run(worker.finish_weight_update(9)) == "checksum-9"
    with pytest.raises(WeightSyncError, match="version 9 arrived after version 9"):
        asyncio.run(worker.finish_weight_update(9))


def test_prompts_must_be_set_first() -> None:
    worker = RolloutWorker(ScriptedEngine(), SERVICES, 1)
    with pytest.raises(RolloutError, match="before the prompts were set"):
        asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=1)]))


class FailingAtOnce(Asking):
    async def start(self, prompt: Prompt, seed: int) -> Ints:
        raise OSError


def test_an_environment_that_fails_every_time_ends_the_rollout_with_its_error() -> None:
    worker = RolloutWorker(ScriptedEngine(), SERVICES, 2, FailingAtOnce)
    worker.set_prompts(make_prompts())
    requests = [RolloutRequest(index, index % 4, 0, 1) for index in range(MOST_FAILURES)]
    with pytest.raises(RolloutError, match="the environment failed: OSError; it is the 16th time") as raised:
        asyncio.run(collect(worker, requests))
    assert isinstance(raised.value.__cause__, OSError)
    # One fewer is a step with rows of prompts alone, labelled with the weights that the worker has.
    worker = RolloutWorker(ScriptedEngine(), SERVICES, 2, FailingAtOnce)
    worker.set_prompts(make_prompts())
    asyncio.run(worker.finish_weight_update(7))
    batches = asyncio.run(collect(worker, requests[:-1]))
    assert {version for batch in batches for version in batch["min_policy_version"].to_pylist()} == {7}


def test_an_engine_that_fails_is_no_failure_of_the_environment() -> None:
    class Broken(ScriptedEngine):
        async def generate(self, *_: Any) -> Completion:
            raise KeyError("block")

    worker = RolloutWorker(Broken(), SERVICES, 2, Asking, Limits(2))
    worker.set_prompts(make_prompts())
    with pytest.raises(RolloutError, match="trajectory 0: the engine failed: KeyError: 'block'"):
        asyncio.run(collect(worker, [RolloutRequest(0, 0, 0, seed=9)]))


def test_turns_tokens_of_a_turn_and_seconds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, engine = rollout(Endless, 100, 3, turns=2, turn_tokens=3)
    assert ragged(batch, "loss_mask")[0].tolist() == [0] * 10 + [1] * 3 + [0] * 2 + [1] * 3
    assert [tokens for _, tokens, _ in engine.asked] == [3, 3]
    assert (batch["reward"][0].as_py(), batch["finish_reason"][0].as_py()) == (0.25, "length")

    clock = [0.0]

    class Slow(Endless):
        async def step(self, completion: Completion) -> Observation | Outcome:
            clock[0] += 30.0
            return await super().step(completion)

    with monkeypatch.context() as patch:
        patch.setattr(episode, "monotonic", lambda: clock[0])
        batch, engine = rollout(Slow, 100, 1, seconds=50.0)
    assert len(engine.asked) == 2
    assert batch["finish_reason"][0].as_py() == "length"

    class Hanging(Asking):
        async def step(self, completion: Completion) -> Observation | Outcome:
            await asyncio.sleep(60)
            raise AssertionError

    batch, _ = rollout(Hanging, 100, 1, seconds=0.05)
    assert batch["finish_reason"][0].as_py() == "environment_error"


class Forgetful(Asking):
    """Shows the prompt and, after each completion, only the number of completions so far; from the fourth, all."""

    async def start(self, prompt: Prompt, seed: int) -> Ints:
        self._prompt = prompt.token_ids.tolist()
        return prompt.token_ids

    async def step(self, completion: Completion) -> Observation | Outcome:
        self._num_seen += 1
        if self._num_seen == 4:
            return Outcome(0.5)
        whole = [*self._prompt, self._num_seen]
        if self._num_seen == 3:  # what the second row holds, and more
            whole = [*self._prompt, 2, *[50] * len(completion.token_ids), 9]
        return Observation(whole, is_whole=True)


def test_a_broken_prefix_begins_a_further_row_of_the_same_episode() -> None:
    engine = ScriptedEngine(longest=2)
    worker = RolloutWorker(engine, SERVICES, 2, Forgetful, Limits(20))
    worker.set_prompts(make_prompts())
    [batch] = asyncio.run(collect(worker, [RolloutRequest(3, 0, 1, seed=9)]))
    prompt = list(range(10, 20))
    tokens, mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
    assert [tokens[row].tolist() for row in range(3)] == [
        [*prompt, 50, 50],
        [*prompt, 1, 50, 50],
        [*prompt, 2, 50, 50, 9, 50, 50],
    ]
    assert [mask[row].tolist() for row in range(3)] == [
        [0] * 10 + [1, 1],
        [0] * 11 + [1, 1],
        [0] * 11 + [1, 1, 0, 1, 1],
    ]
    assert batch["trajectory_id"].to_pylist() == [3, row_id(3, 1), row_id(3, 2)]
    assert batch["episode_id"].to_pylist() == [3, 3, 3]
    assert batch["turn"].to_pylist() == [0, 1, 2]
    assert batch["sample_index"].to_pylist() == [1, 1, 1]
    assert batch["reward"].to_pylist() == [0.5, 0.5, 0.5]
    assert [asked for _, _, asked in engine.asked] == [9, turn_seed(9, 1), turn_seed(9, 2), turn_seed(9, 3)]


class Leading:
    """Asks for two completions of its own accord, of which the second goes on from the first."""

    def __init__(self, services: Services) -> None:
        self.limit = False

    async def run(self, prompt: Prompt, seed: int, sample: Any) -> Outcome:
        prompt_ids = prompt.token_ids.tolist()
        first, _ = await asyncio.gather(sample(prompt_ids), sample([*prompt_ids, 30]))
        await sample([*prompt_ids, *first.token_ids, 31])
        try:
            await sample([*prompt_ids, 32])
        except LimitReached:
            return Outcome(0.75)
        raise AssertionError


def test_an_agent_leads_its_episode_and_learns_of_the_limit() -> None:
    batch, engine = rollout(Leading, max_observation_tokens=20, longest=2, turns=3)
    assert len(engine.asked) == 3
    tokens = ragged(batch, "token_ids")
    prompt = list(range(10, 20))
    assert tokens[0].tolist() == [*prompt, 50, 50, 31, 50, 50]
    assert tokens[1].tolist() == [*prompt, 30, 50, 50]
    assert batch["reward"].to_pylist() == [0.75, 0.75]
    assert batch["turn"].to_pylist() == [0, 1]
