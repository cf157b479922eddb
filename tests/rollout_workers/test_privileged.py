"""The sampler that reads a hint: what it reads, which text it gives, and what its row says."""

import asyncio
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.config.context import PrivilegedConfig
from cluster.config.run_config import Config
from cluster.contracts.columns import Floats, Ints
from cluster.contracts.errors import ConfigError, RolloutError
from cluster.contracts.metrics import merge, report
from cluster.contracts.requests import PRIVILEGED_IDS, Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import ragged
from rollout_workers.contexts.builder import ContextBuilder, ContextSettings
from rollout_workers.contexts.groups import Attempt
from rollout_workers.environments.base import Outcome, Prompt, Services
from rollout_workers.load_prompts import load_prompts
from rollout_workers.privileged import (
    BlindScores,
    PrivilegedPlan,
    PrivilegedSampler,
    PrivilegedSettings,
    plan_privileged,
    select,
)
from rollout_workers.prompts import PromptSet, sampling_seed
from rollout_workers.worker import RolloutWorker
from tests.builders import make_config, make_trajectory

WORDS = ["<unk>", "one", "two", "plus", "is", "hint", "three", "four"]
PLAIN, HINTED = [1, 3, 2, 4], [5, 6, 1, 3, 2, 4]  # "one plus two is", and "hint three" before it
ROWS = [
    {"prompt": "one plus two is", "answer": "three", "sum": "three"},
    {"prompt": "one plus one is", "answer": "two"},
]
TEMPLATE = "{% if sum is defined %}hint {{ sum }} {{ prompt }}{% endif %}"
SAMPLING = SamplingSettings(max_completion_tokens=4, temperature=1.0)
NOW = datetime(2026, 1, 2)
SAMPLER = "privileged:student"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


class HintedEngine:
    """Writes, one request after the other, given texts; scores a right one by a table of its length."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = [np.array(text, np.int32) for text in texts]
        self.read: list[list[int]] = []
        self.seeds: list[int] = []
        self.scored: list[list[int]] = []

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        text = self._texts[len(self.read)]
        self.read.append(list(prompt_ids))
        self.seeds.append(seed)
        logprobs = -0.1 * np.arange(1, 1 + len(text), dtype=np.float32)
        return Completion(text, logprobs, "stop", np.full(len(text), 7, np.int32))

    async def prompt_logprobs(
        self, request_id: str, token_ids: Ints, places: Ints, count: int, priority: int
    ) -> tuple[Ints, Floats]:
        self.scored.append(token_ids.tolist())
        # Longer texts are likelier, but for one token far from the favourite.
        logprobs = np.zeros((len(places), 1 + count), np.float32)
        logprobs[:, 0] = -4.0 / len(places) ** 2
        return np.zeros(logprobs.shape, np.int32), logprobs


class Sums:
    """Rewards texts that hold the prompt's answer, the token 6."""

    def __init__(self, services: Services) -> None:
        pass

    async def start(self, prompt: Prompt, seed: int) -> Any:
        return prompt.token_ids

    async def step(self, completion: Completion) -> Outcome:
        return Outcome(float(6 in completion.token_ids))


def run_config(*overrides: str, template: str = TEMPLATE) -> Config:
    terms = "objective.terms={main={loss='cross_entropy',gate={},rows='privileged'}}"
    fixed = ("prompts.template=raw", "rollout.max_completion_tokens=4", terms)
    return make_config(f"rollout.privileged.template={template}", *fixed, *overrides)


def planned(
    folder: Path, tokenizer: Any, *overrides: str, template: str = TEMPLATE, rows: Sequence[Any] = ROWS
) -> tuple[PrivilegedPlan, PromptSet]:
    config, path = run_config(*overrides, template=template), folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(path, tokenizer, config, context_tokens=64)
    return plan_privileged(config, prompts, len(prompts), tokenizer, 64, NOW), prompts


def answer(
    folder: Path,
    tokenizer: Any,
    texts: Sequence[Sequence[int]],
    *overrides: str,
    requests: Any = None,
    writer: HintedEngine | None = None,
) -> tuple[pa.RecordBatch, dict[str, float], HintedEngine]:
    """Return the batch that answers a request for prompt 0, its metrics, and what the student's engine saw."""
    samples = f"rollout.privileged.samples_per_prompt={len(texts)}"
    plan, prompts = planned(folder, tokenizer, *overrides if requests else (samples, *overrides))
    settings, engine = plan.settings, HintedEngine(texts)
    assert settings is not None
    worker = RolloutWorker(
        engine,  # type: ignore[arg-type]
        Services(lambda text: [], lambda ids: ""),
        8,
        Sums,
        privileged=lambda prompts, engine, sample: PrivilegedSampler(
            settings, ContextBuilder(settings.contexts, tokenizer, prompts), engine, sample, writer
        ),
    )
    worker.set_prompts(prompts)

    async def collect() -> Any:
        asked = requests or [RolloutRequest(PRIVILEGED_IDS, 0, 0, seed=9)]
        return [(batch, metrics) async for batch, metrics, _ in worker.generate(asked, SAMPLING)]

    batches, metrics = zip(*asyncio.run(collect()), strict=True)
    return pa.concat_batches(batches), report(merge(metrics)), engine


def test_the_likeliest_right_text_becomes_a_row_of_the_prompt_without_the_hint(tmp_path: Path, tokenizer: Any) -> None:
    batch, metrics, engine = answer(tmp_path, tokenizer, [[7, 7, 7], [6], [7], [6, 7]])
    assert engine.read == [HINTED] * 4
    assert engine.seeds == [sampling_seed(9, 0, number) for number in range(4)]
    assert engine.scored == [[*PLAIN, 6], [*PLAIN, 6, 7]]  # the right ones, as the student itself reads them
    assert ragged(batch, "token_ids")[0].tolist() == [*PLAIN, 6, 7]  # log-probability -2 against -4
    assert ragged(batch, "loss_mask")[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert ragged(batch, "rollout_logprobs")[0] == pytest.approx([-0.1, -0.2])  # those of the sampler
    assert batch["sampler"].to_pylist() == [SAMPLER]
    assert (batch["trajectory_id"][0].as_py(), batch["reward"][0].as_py()) == (PRIVILEGED_IDS, 1.0)
    assert batch["min_policy_version"][0].as_py() == 7
    assert metrics["privileged/tokens"] == 7
    assert (metrics["privileged/solve_rate"], metrics["privileged/acceptance"]) == (0.5, 1)
    assert metrics["privileged/chosen_logprob"] == -1
    # d = 4 at the one token of the first right text, and 1 at both of the second: exp(-0.5 d).
    assert metrics["privileged/gentleness"] == pytest.approx((math.exp(-2) + math.exp(-0.5)) / 2)
    assert metrics["privileged/chosen_gentleness"] == pytest.approx(math.exp(-0.5))


def test_a_prompt_without_a_right_text_gives_a_row_without_loss(tmp_path: Path, tokenizer: Any) -> None:
    batch, metrics, engine = answer(tmp_path, tokenizer, [[7], [7, 7]])
    assert engine.scored == []
    assert ragged(batch, "loss_mask")[0].sum() == 0
    assert len(ragged(batch, "rollout_logprobs")[0]) == 0
    assert batch["sampler"].to_pylist() == [SAMPLER]
    assert (metrics["privileged/solve_rate"], metrics["privileged/acceptance"]) == (0, 0)
    assert "privileged/gentleness" not in metrics


def test_a_text_that_is_not_gentle_enough_is_not_learned_from(tmp_path: Path, tokenizer: Any) -> None:
    limit = "rollout.privileged.min_gentleness=0.61"  # exp(-0.5) is 0.607
    batch, metrics, _ = answer(tmp_path, tokenizer, [[6], [6, 7]], limit)
    assert ragged(batch, "loss_mask")[0].sum() == 0
    assert (metrics["privileged/solve_rate"], metrics["privileged/acceptance"]) == (1, 0)


def test_rows_of_the_sampler_do_not_count_among_the_students_own(tmp_path: Path, tokenizer: Any) -> None:
    both = [RolloutRequest(0, 0, 0, seed=1), RolloutRequest(PRIVILEGED_IDS, 0, 0, seed=9)]
    one_try = "rollout.privileged.samples_per_prompt=1"
    batch, metrics, engine = answer(tmp_path, tokenizer, [[7, 7, 7], [6]], one_try, requests=both)
    assert engine.read == [PLAIN, HINTED]
    assert sorted(batch["sampler"].to_pylist()) == [SAMPLER, "student"]
    assert metrics["rollout/reward"] == 0  # the student's; with the sampler's row it would be 0.5
    assert metrics["rollout/completion_length"] == 3
    assert (metrics["rollout/tokens"], metrics["privileged/tokens"]) == (3, 1)


def test_a_teacher_writes_and_the_student_selects(tmp_path: Path, tokenizer: Any) -> None:
    texts = [[7, 7, 7], [6], [7], [6, 7]]
    writer = HintedEngine(texts)
    both = [RolloutRequest(0, 0, 0, seed=1), RolloutRequest(PRIVILEGED_IDS, 0, 0, seed=9)]
    of_teacher = ("rollout.privileged.sampler=main", "rollout.privileged.samples_per_prompt=4")
    batch, metrics, student = answer(tmp_path, tokenizer, [[7]], *of_teacher, requests=both, writer=writer)
    assert (student.read, writer.read) == ([PLAIN], [HINTED] * 4)
    assert (student.scored, writer.scored) == ([[*PLAIN, 6], [*PLAIN, 6, 7]], [])
    rows = dict(zip(batch["sampler"].to_pylist(), ragged(batch, "token_ids"), strict=True))
    assert {name: ids.tolist() for name, ids in rows.items()} == {
        "student": [*PLAIN, 7],
        "privileged:main": [*PLAIN, 6, 7],
    }
    assert (metrics["rollout/tokens"], metrics["privileged/tokens"]) == (1, 7)


def test_a_teacher_without_a_template_reads_the_prompt_itself(tmp_path: Path, tokenizer: Any) -> None:
    config = make_config(
        "rollout.privileged={sampler='main'}",
        "prompts.template=raw",
        "rollout.max_completion_tokens=4",
        "objective.terms={main={loss='cross_entropy',gate={},rows='privileged'}}",
    )
    section = config.rollout.privileged
    assert section is not None
    (tmp_path / "p.jsonl").write_text(json.dumps(ROWS[0]))
    prompts = load_prompts(tmp_path / "p.jsonl", tokenizer, config, context_tokens=64)
    builder = ContextBuilder(ContextSettings((), config.prompts, NOW), tokenizer, prompts)
    sampler = PrivilegedSampler(PrivilegedSettings(section, builder.settings), builder, None, None)  # type: ignore[arg-type]
    assert sampler.prompt_ids(0).tolist() == PLAIN


def test_all_rows_of_an_episode_are_scored_and_are_the_samplers(tmp_path: Path, tokenizer: Any) -> None:
    plan, prompts = planned(tmp_path, tokenizer)
    assert plan.settings is not None
    engine, builder = HintedEngine([]), ContextBuilder(plan.settings.contexts, tokenizer, prompts)
    first, last = (
        make_trajectory(PLAIN, [6] * count, trajectory_id=PRIVILEGED_IDS + count, reward=1.0) for count in (1, 2)
    )

    async def sample(*_: Any) -> Attempt:
        return Attempt(last, earlier=(first,))

    sampler = PrivilegedSampler(plan.settings, builder, engine, sample)  # type: ignore[arg-type]
    attempt = asyncio.run(sampler.answer(RolloutRequest(PRIVILEGED_IDS, 0, 0, seed=9), SAMPLING, 0))
    assert engine.scored[:2] == [[*PLAIN, 6], [*PLAIN, 6, 6]]
    assert [row.sampler for row in (*attempt.earlier, attempt.trajectory)] == [SAMPLER] * 2
    metrics = report(attempt.metrics)
    assert metrics["privileged/tokens"] == 3 * plan.settings.config.samples_per_prompt
    assert metrics["privileged/chosen_logprob"] == (-4 - 1 - 1) / 3


def test_without_a_sampler_its_requests_are_refused() -> None:
    worker = RolloutWorker(HintedEngine([]), Services(lambda text: [], lambda ids: ""), 8)  # type: ignore[arg-type]
    worker.set_prompts(PromptSet.of_token_ids([[1]], "main"))

    async def collect() -> None:
        async for _ in worker.generate([RolloutRequest(PRIVILEGED_IDS, 0, 0, seed=9)], SAMPLING):
            pass

    with pytest.raises(RolloutError, match="is for a privileged sampler, and there is none"):
        asyncio.run(collect())


def test_a_context_that_says_no_more_than_the_prompt_makes_the_sampler_the_student(
    tmp_path: Path, tokenizer: Any
) -> None:
    plan, prompts = planned(tmp_path, tokenizer, template="{{ prompt }}")
    assert plan.settings is not None
    builder = ContextBuilder(plan.settings.contexts, tokenizer, prompts)
    sampler = PrivilegedSampler(plan.settings, builder, None, None)  # type: ignore[arg-type]
    assert [sampler.prompt_ids(number).tolist() for number in (0, 1)] == [PLAIN, [1, 3, 1, 4]]


def test_prompts_without_a_context_are_none_of_the_samplers(tmp_path: Path, tokenizer: Any) -> None:
    plan, _ = planned(tmp_path, tokenizer)
    assert plan.prompt_ids == {0}
    assert plan.prompt_tokens == len(HINTED)
    assert plan.notes == ("rollout.privileged: 1 of 2 prompts have no context, or no room for it",)


def test_a_shuffled_context_is_that_of_another_prompt(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**row, "sum": name} for row, name in zip(ROWS, ("three", "four"), strict=True)]
    plan, prompts = planned(tmp_path, tokenizer, "rollout.privileged.shuffled=true", rows=rows)
    assert plan.settings is not None
    builder = ContextBuilder(plan.settings.contexts, tokenizer, prompts)
    sampler = PrivilegedSampler(plan.settings, builder, None, None)  # type: ignore[arg-type]
    assert sampler.prompt_ids(0).tolist() == [5, 7, *PLAIN]


@pytest.mark.parametrize(
    ("template", "overrides", "message"),
    [
        ("{{ prompt }} {{ feedback }}", (), r"rollout.privileged: the template reads an attempt"),
        ("{{ prompt }} {{ proof }}", (), r"rollout.privileged: the template reads `proof`, and no prompt has such"),
        ("{% if a is defined %}{{ a }}{% endif %}", (), r"none of the 2 prompts has a context that fits"),
        (
            TEMPLATE,
            ("teachers.main.context.template={{ prompt }} {{ attempt }}", "rollout.samples_per_prompt=2"),
            r"teachers.main.context shows other attempts",
        ),
    ],
)
def test_what_the_sampler_cannot_read_is_refused(
    template: str, overrides: tuple[str, ...], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, tokenizer, *overrides, template=template)


def scores(*gaps: float) -> BlindScores:
    """Return a text whose tokens are so many nats below the student's favourites, of log-probability -1."""
    values = np.array(gaps, np.float32)
    return BlindScores(-1 - values, np.full_like(values, -1))


def test_gentleness_is_1_for_what_greedy_decoding_writes_and_one_unlikely_token_decides() -> None:
    config = PrivilegedConfig("{{ hint }}", sharpness=5, strength=0.5)
    assert scores(0, 0, 0).gentleness(config) == 1
    assert scores(3, 3).gentleness(config) == pytest.approx(math.exp(-1.5))
    # exp(-0.1 log((1 + exp(20)) / 2)), against exp(-0.5 * 2) of the mean.
    assert scores(0, 4).gentleness(config) == pytest.approx(math.exp(-0.1 * math.log((1 + math.exp(20)) / 2)))
    assert scores(0, 4).gentleness(config) < scores(2, 2).gentleness(config)
    assert scores(1000).gentleness(config) == pytest.approx(0, abs=1e-12)  # and no overflow


def test_what_is_selected_is_the_likeliest_the_gentlest_or_the_first() -> None:
    # Whole texts have -7, -5 and -8 nats; the third is at its favourites everywhere.
    texts = [scores(2, 2, 0), scores(4), scores(0, 0, 0, 0, 0, 0, 0, 0)]
    chosen = {
        how: select(PrivilegedConfig("{{ hint }}", select=how), texts) for how in ("likelihood", "gentleness", "first")
    }
    assert chosen == {"likelihood": 1, "gentleness": 2, "first": 0}
    assert select(PrivilegedConfig("{{ hint }}"), []) is None
