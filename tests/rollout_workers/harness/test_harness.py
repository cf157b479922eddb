"""Harnesses as environments: what they ask, what the student reads, and what the episode comes to."""

import asyncio
import json
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from rollout_workers.episode import Limits
from rollout_workers.harness.endpoint import Endpoint
from rollout_workers.harness.environment import HarnessEnvironment, HarnessError
from rollout_workers.prompt_row import PromptRow
from rollout_workers.prompts import PromptSet
from rollout_workers.worker import RolloutWorker
from tests.rollout_workers.harness import agents
from tests.rollout_workers.harness.driver import ScriptedEpisode, play

PATIENCE_SECONDS = 120.0


def test_sampled_ids_stay_and_what_follows_is_read_once(tokenizer: PreTrainedTokenizerFast) -> None:
    episode = ScriptedEpisode(tokenizer, "two_turns", arguments={"reward": 0.25})
    end = tokenizer.eos_token_id
    # "on" as two tokens: to tokenise the text again would give one.
    first, second = [*episode.ids("o"), *episode.ids("n"), end], [*episode.ids("two"), end]
    outcome = play(episode, first, second)
    opening = episode.ids("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    between = episode.ids("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")
    assert episode.rows == [[*opening, *first, *between, *second]]
    assert len(episode.ids("on")) == 1
    assert outcome.reward == 0.25
    made = json.loads(outcome.feedback)
    assert made["prompt_token_ids"] == [*opening, *first, *between]
    assert made["choices"][0]["token_ids"] == second
    assert made["choices"][0]["message"] == {"role": "assistant", "content": "two"}
    assert [one["logprob"] for one in made["choices"][0]["logprobs"]["content"]] == [-1.0, -2.0, -3.0, -4.0]
    assert made["usage"] == {
        "prompt_tokens": len(episode.rows[0]) - 4,
        "completion_tokens": 4,
        "total_tokens": len(episode.rows[0]),
    }


def test_a_history_that_is_another_begins_another_row_and_the_verifier_rewards_what_came_last(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    episode = ScriptedEpisode(tokenizer, "forgets")
    first, second = [*episode.ids("two"), tokenizer.eos_token_id], [*episode.ids("answer"), tokenizer.eos_token_id]
    outcome = play(episode, first, second)
    asked = [episode.ids(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in ("one", "again")]
    assert episode.rows == [[*asked[0], *first], [*asked[1], *second]]
    assert outcome.reward == 1.0


def test_the_package_openai_calls_tools_and_streams_with_the_ids_intact(tokenizer: PreTrainedTokenizerFast) -> None:
    episode = ScriptedEpisode(tokenizer, "openai_client")
    call = 'Hm. <tool_call>\n{"name": "add",  "arguments": {"a": 1}}\n</tool_call>'  # two blanks that JSON would lose
    first, second = [*episode.ids(call), tokenizer.eos_token_id], [*episode.ids("two"), tokenizer.eos_token_id]
    outcome = play(episode, first, second)
    assert json.loads(outcome.feedback) == ["tool_calls", [["add", '{"a": 1}']], "two", ["student"]]
    opening = episode.ids("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    between = episode.ids(
        "\n<|im_start|>tool\nthree<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    )
    assert episode.rows == [[*opening, *first, *between, *second]]


@pytest.mark.parametrize(
    ("harness", "says"),
    [
        ("fails", "KeyError: 'no such tool'"),
        ("never_asks", "the harness ended without a completion"),
        ("dies", "the process of the harness ended with code 3"),
        ("says_too_much", "the process of the harness ended with code -9"),
        ("infinite", "the harness returned the reward inf; expected a finite number"),
    ],
)
def test_a_harness_that_fails_says_why(tokenizer: PreTrainedTokenizerFast, harness: str, says: str) -> None:
    with pytest.raises(HarnessError, match=says):
        play(ScriptedEpisode(tokenizer, harness), [5, tokenizer.eos_token_id])


def test_a_limit_refuses_the_request_and_what_the_harness_makes_of_that_counts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert play(ScriptedEpisode(tokenizer, "two_turns"), [5]).reward == 0.0  # it does not expect to be refused
    assert play(ScriptedEpisode(tokenizer, "takes_what_it_gets"), [5]).reward == 0.75


async def eventually(is_true: Callable[[], object]) -> None:
    """Wait until something is true, however busy the machine is."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not is_true():
            await asyncio.sleep(0.02)


def test_an_episode_that_ends_cancels_its_harness_and_its_key(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    episode, file = ScriptedEpisode(tokenizer, "waits"), tmp_path / "key"

    async def run() -> None:
        playing = asyncio.create_task(episode.play([5, 6], columns={"file": str(file)}))
        await eventually(file.exists)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        await eventually(file.read_text)
        key = file.read_text()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            await asyncio.to_thread(agents.ask, episode.runtime.endpoint.base_url, key, [{"role": "user"}])
        await episode.shutdown()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "the request has no messages"),
        ({"messages": [{"content": "one"}]}, "every message is an object with a role"),
        ({"messages": [{"role": "user", "content": "one"}], "n": 2}, "`n` is 2, which this endpoint does not serve"),
        ({"messages": [{"role": "user", "content": "refused"}]}, "refuses the prompt: no such words"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_in_a_sentence(
    tokenizer: PreTrainedTokenizerFast, body: dict[str, Any], says: str
) -> None:
    outcome = play(ScriptedEpisode(tokenizer, "is_refused"), [5], columns={"body": body})
    assert says in outcome.feedback


def test_a_request_whose_client_has_gone_is_given_up() -> None:
    async def run() -> None:
        endpoint = Endpoint("127.0.0.1")
        await endpoint.start()
        key, calls = endpoint.open()
        body = {"messages": [{"role": "user"}]}
        async with httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {key}"}) as client:
            asking = asyncio.create_task(client.post(f"{endpoint.base_url}/chat/completions", json=body))
            call = await calls.get()
            assert not call.is_given_up
            asking.cancel()
            await eventually(lambda: call.is_given_up)
        await endpoint.shutdown()

    asyncio.run(run())


OPENING = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"


class EchoEngine:
    """Samples the last three ids that it reads, with log-probability -1 and under policy version 4."""

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        ids = np.array(prompt_ids[-3:], np.int32)
        return Completion(ids, np.full(3, -1.0, np.float32), "stop", np.full(3, 4, np.int32))

    async def shutdown(self) -> None:
        pass


def generate(episode: ScriptedEpisode, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let a worker run this many episodes on an engine that repeats what it reads; return its rows and metrics."""
    prompt = {"token_ids": [episode.ids(OPENING)], "text": ["one"], "answer": [None], "domain": [""]}
    row = msgspec.json.encode(PromptRow("one")).decode()
    prompts = PromptSet.of_columns({**prompt, "teacher": ["main"], "columns": [None], "source": [row]})
    limits = Limits(observation_tokens=200)
    worker = RolloutWorker(EchoEngine(), episode.services, 4, HarnessEnvironment, limits)  # type: ignore[arg-type]
    worker.set_prompts(prompts)
    requests = [RolloutRequest(index, 0, index, seed=index) for index in range(count)]

    async def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        generated = worker.generate(requests, SamplingSettings(16, 1.0))
        [(batch, metrics)] = [(batch, metrics) async for batch, metrics, _ in generated]
        await worker.shutdown()
        return batch.sort_by("trajectory_id").to_pylist(), dict(metrics)

    return asyncio.run(run())


def test_an_episode_whose_harness_fails_teaches_nothing_and_the_others_are_rows(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    episode = ScriptedEpisode(tokenizer, "fails_for_odd_seeds")
    rows, metrics = generate(episode, 4)
    opening = episode.ids(OPENING)
    whole = [*opening, *opening[-3:]]
    assert [row["token_ids"] for row in rows] == [whole] * 4
    assert [row["finish_reason"] for row in rows] == ["stop", "environment_error"] * 2
    assert [sum(row["loss_mask"]) for row in rows] == [3, 0, 3, 0]
    assert [row["rollout_logprobs"] for row in rows] == [[-1.0] * 3, [], [-1.0] * 3, []]
    assert [row["reward"] for row in rows] == [0.5, None, 0.5, None]
    assert (rows[0]["min_policy_version"], rows[0]["max_policy_version"]) == (4, 4)
    assert metrics["rollout/environment_errors"].value == 2.0


def test_two_ways_on_from_one_answer_are_two_rows_and_the_answer_is_trained_once(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    episode = ScriptedEpisode(tokenizer, "branches")
    rows, _ = generate(episode, 1)
    opening = episode.ids(OPENING)
    echo = opening[-3:]
    asked = [
        episode.ids(f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        for text in ("two", "three")
    ]
    assert [row["token_ids"] for row in rows] == [[*opening, *echo, *more, *echo] for more in asked]
    sampled = [
        [*[0] * len(opening), *[own] * 3, *[0] * len(more), *[1] * 3] for own, more in zip((1, 0), asked, strict=True)
    ]
    assert [row["loss_mask"] for row in rows] == sampled
    assert [(row["episode_id"], row["turn"], row["reward"]) for row in rows] == [(0, 0, 0.5), (0, 2, 0.5)]
