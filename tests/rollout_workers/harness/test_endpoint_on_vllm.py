"""An agent written for OpenAI's interface drives episodes of a real rollout actor; transformers scores its rows."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cluster.actors.cluster import PoolTimeouts
from cluster.config.sections import EnvironmentConfig, PromptsConfig, StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.requests import SamplingSettings
from cluster.contracts.trajectory import row_id
from rollout_workers.load_prompts import load_prompts
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.builders import make_config
from tests.rollout_workers.deployment import RolloutDeployment
from tests.tiny_qwen3 import CONTEXT_TOKENS, expected_logprobs, load, write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w12 {{ m.content }} <eos> "
    "{% else %}w10 {{ m.content }} w11 {% endif %}{% endfor %}{% if add_generation_prompt %}w12{% endif %}"
)
HARNESS = "tests.rollout_workers.harness.agents:external"
PROMPTS = ["w40 w41", "w42", "w43 w44 w45"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which agents write down what they asked and got."""
    return tmp_path_factory.mktemp("asked")


@pytest.fixture(scope="module")
def rollouts(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, asked: Path) -> Iterator[RolloutDeployment]:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("student"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    environment = EnvironmentConfig(
        "harness", harness=HARNESS, arguments={"folder": str(asked)}, max_observation_tokens=100, max_turn_tokens=12
    )
    config = make_config(
        "environment.kind=harness", f"environment.harness={HARNESS}", "rollout.max_completion_tokens=300"
    )
    student = StudentConfig(str(folder))
    settings = RolloutActorSettings(
        student=student,
        engine=EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1),
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport=None,
        environment=environment,
        chat=(student, PromptsConfig(str(file)), datetime.now()),
    )
    pool = RolloutPool(settings, [{"num_cpus": 1}], PoolTimeouts(start_seconds=500, call_seconds=120))
    pool.wait_until_ready()
    prompts = load_prompts(file, tokenizer, config, CONTEXT_TOKENS)
    pool.set_prompts(prompts)
    yield RolloutDeployment(pool, prompts, load(folder))
    pool.shutdown()


def sampled(row: dict[str, Any]) -> list[int]:
    ids: list[int] = row["token_ids"][row["loss_mask"] != 0].tolist()
    return ids


def test_the_ids_that_a_client_gets_are_those_that_are_trained(rollouts: RolloutDeployment, asked: Path) -> None:
    requests = rollouts.requests([0, 1, 2] * 2)
    rows = rollouts.generate(requests, SamplingSettings(300, 1.0))
    assert len(rows) == 2 * len(requests)  # a conversation, and the one apart
    by_id = {row["trajectory_id"]: row for row in rows}
    for request in requests:
        main, apart = (by_id[row_id(request.trajectory_id, index)] for index in range(2))
        first, other, second, third = json.loads((asked / f"{request.seed}.json").read_text())
        assert sampled(main) == [*first[1], *second[1], *third[1]]
        assert main["token_ids"].tolist() == [*third[0], *third[1]]
        assert third[0][: len(second[0]) + len(second[1])] == [*second[0], *second[1]]
        assert (apart["token_ids"].tolist(), sampled(apart)) == ([*other[0], *other[1]], other[1])
        assert {row["episode_id"] for row in (main, apart)} == {request.trajectory_id}
        assert ((main["turn"], apart["turn"]), (main["reward"], apart["reward"])) == ((0, 1), (1.0, 1.0))
        for row in (main, apart):
            expected = expected_logprobs(rollouts.student, row["token_ids"].tolist())[
                np.flatnonzero(row["loss_mask"]) - 1
            ]
            ids = torch.tensor(sampled(row))
            gaps = expected.gather(1, ids[:, None])[:, 0].numpy() - row["rollout_logprobs"]
            assert np.abs(gaps).max() < 1e-4
            assert row["min_policy_version"] == row["max_policy_version"] == 0
