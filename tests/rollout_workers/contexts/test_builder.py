"""What a teacher reads in the place of the student's prompt."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError, PreceptorError, RolloutError
from cluster.contracts.metrics import report
from cluster.contracts.requests import ContextUse
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.trajectory import GeneratedTrajectory, make_generated
from rollout_workers.contexts.builder import ContextBuilder, answers_early
from rollout_workers.contexts.groups import Attempt
from rollout_workers.contexts.plan import ContextPlan, plan_contexts, prompts_with_contexts
from rollout_workers.load_prompts import load_prompts
from rollout_workers.prompts import PromptSet
from tests.builders import make_config, make_trajectory

WORDS = ["<unk>", "user", "system", "assistant", "one", "two", "three", "hint", "right", "wrong", "reads", "terse"]
CHAT = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
NOW = datetime(2026, 1, 2)
CONTEXT_TOKENS = 64


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=CHAT)


def run_config(template: str, *overrides: str) -> Config:
    fixed = ("rollout.max_completion_tokens=8", "rollout.samples_per_prompt=4")
    return make_config(f"teachers.main.context.template={template}", *fixed, *overrides)


class Contexts:
    """Holds the contexts of one run file on some prompts."""

    def __init__(self, folder: Path, tokenizer: Any, rows: Sequence[Any], template: str, *overrides: str) -> None:
        config, path = run_config(template, *overrides), folder / "p.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tokenizer = tokenizer
        self.prompts = PromptSet.from_wire(load_prompts(path, tokenizer, config, CONTEXT_TOKENS).to_wire())
        self.plan: ContextPlan = plan_contexts(config, self.prompts, tokenizer, {"main": CONTEXT_TOKENS}, NOW)
        assert self.plan.settings is not None
        self.builder = ContextBuilder(self.plan.settings, tokenizer, self.prompts)

    def row(self, attempt: Attempt, group: Sequence[Attempt] = (), use: ContextUse = "all") -> GeneratedTrajectory:
        return self.builder.add(attempt, group, use)[0]

    def read(self, attempt: Attempt, group: Sequence[Attempt] = ()) -> str:
        return self.tokenizer.decode(self.row(attempt, group).scorer_prompts["teacher"])

    def metrics(self, attempt: Attempt, group: Sequence[Attempt] = ()) -> dict[str, float]:
        return report(self.builder.add(attempt, group, "all")[1])


def make_attempt(prompt_id: int = 0, text: str = "", feedback: str = "", **fields: Any) -> Attempt:
    return Attempt(make_trajectory(prompt_id=prompt_id, **fields), text, feedback)


def make_group(*texts_and_rewards: tuple[str, float | None], prompt_id: int = 0) -> list[Attempt]:
    return [
        make_attempt(prompt_id, text, trajectory_id=10 * prompt_id + index, sample_index=index, reward=reward)
        for index, (text, reward) in enumerate(texts_and_rewards)
    ]


ROWS = [{"prompt": "one", "answer": "two", "tip": "hint"}, {"prompt": "two", "answer": "three", "tip": "right"}]


def test_the_template_reads_prompt_answer_and_columns_and_the_chat_template_writes_the_rest(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [
        ROWS[0],
        {"prompt": [{"role": "system", "content": "terse"}, {"role": "user", "content": "three"}], "tip": "right"},
    ]
    contexts = Contexts(tmp_path, tokenizer, rows, "{{ prompt }} {{ tip }} {{ answer or columns.tip }}")
    assert contexts.read(make_attempt(0)) == "user one hint two assistant"
    assert contexts.read(make_attempt(1)) == "system terse user three right right assistant"
    assert contexts.plan.prompt_tokens == {"main": 7}


def test_a_context_that_is_the_prompt_gives_the_students_own_tokens(tmp_path: Path, tokenizer: Any) -> None:
    contexts = Contexts(tmp_path, tokenizer, ROWS, "{{ prompt }}")
    own = contexts.row(make_attempt(1)).scorer_prompts["teacher"]
    assert own.tolist() == contexts.prompts.prompt(1).token_ids.tolist()


def test_the_hash_changes_with_one_token_of_the_template_and_with_each_input(tmp_path: Path, tokenizer: Any) -> None:
    same = [Contexts(tmp_path, tokenizer, ROWS, "{{ prompt }} {{ tip }}").row(make_attempt(0)) for _ in range(2)]
    other = Contexts(tmp_path, tokenizer, ROWS, "{{ prompt }}  {{ tip }}").row(make_attempt(0))
    rows = [{**ROWS[0], "tip": "terse"}, ROWS[1]]
    changed = Contexts(tmp_path, tokenizer, rows, "{{ prompt }} {{ tip }}").row(make_attempt(0))
    assert same[0].context_hash == same[1].context_hash
    assert len({same[0].context_hash, other.context_hash, changed.context_hash}) == 3
    assert other.scorer_prompts["teacher"].tolist() == same[0].scorer_prompts["teacher"].tolist()


def test_other_rows_contexts_change_nothing_for_a_row(tmp_path: Path, tokenizer: Any) -> None:
    template = "{{ prompt }} {{ tip }}"
    alone = Contexts(tmp_path, tokenizer, ROWS, template).row(make_attempt(0))
    permuted = Contexts(tmp_path, tokenizer, [ROWS[0], {**ROWS[1], "tip": "wrong wrong"}], template)
    permuted.row(make_attempt(1))
    beside = permuted.row(make_attempt(0))
    assert beside.context_hash == alone.context_hash
    assert beside.scorer_prompts["teacher"].tolist() == alone.scorer_prompts["teacher"].tolist()


SDPO = "{% if attempt or feedback %}{{ prompt }} {{ attempt or feedback }}{% endif %}"


def test_the_next_right_attempt_is_shown_without_its_thinking_and_never_ones_own(
    tmp_path: Path, tokenizer: Any
) -> None:
    contexts = Contexts(tmp_path, tokenizer, ROWS, SDPO)
    group = make_group(("<think> wrong </think> right", 1.0), ("wrong", 0.0), ("reads right", 0.5), ("two", None))
    seen = [contexts.read(attempt, group) for attempt in group]
    assert seen == [
        "user one reads right assistant",
        *["user one reads right assistant"] * 1,
        *["user one right assistant"] * 2,
    ]
    own = Contexts(tmp_path, tokenizer, ROWS, SDPO, "teachers.main.context.own_attempt=true")
    group = make_group(("right", 1.0), ("wrong", 0.0))
    assert [own.read(attempt, group) for attempt in group] == ["user one right assistant"] * 2
    assert [contexts.read(attempt, group) for attempt in group] == ["", "user one right assistant"]


def test_feedback_stands_where_no_attempt_is_right_and_a_row_with_neither_is_masked(
    tmp_path: Path, tokenizer: Any
) -> None:
    contexts = Contexts(tmp_path, tokenizer, ROWS, SDPO)
    group = make_group(("wrong", 0.0), ("wrong", 0.0))
    corrected = replace(group[0], feedback="reads wrong")
    assert contexts.read(corrected, group) == "user one reads wrong assistant"
    row = contexts.row(group[1], group)
    assert (row.loss_mask.sum(), len(row.rollout_logprobs), row.context_hash, row.reward) == (0, 0, "", 0.0)
    assert row.token_ids.tolist() == group[1].trajectory.token_ids.tolist()
    assert contexts.metrics(group[1], group)["context/missing_rows"] == 1
    assert contexts.metrics(corrected, group)["context/missing_rows"] == 0
    # In one batch with others, as a row of which nothing is scored.
    batch = make_generated([row, contexts.row(corrected, group)])
    assert [len(logprobs) for logprobs in batch["rollout_logprobs"].to_pylist()] == [0, 3]


def test_a_further_row_reads_the_context_and_what_followed_the_prompt(tmp_path: Path, tokenizer: Any) -> None:
    contexts = Contexts(tmp_path, tokenizer, ROWS, "{{ tip }} {{ prompt }}")
    prompt = contexts.prompts.prompt(0).token_ids  # user one assistant
    context = tokenizer.encode("user hint one assistant")
    further = make_attempt(prompt=[*prompt, 8, 9], completion=[5, 6], turn=1, episode_id=3, trajectory_id=3)
    row = contexts.row(further)
    tokens, mask = as_read_by(make_generated([row]), "teacher")
    assert tokens[0].tolist() == [*context, 8, 9, 5, 6]
    assert mask[0].tolist() == [0] * (len(context) + 2) + [1, 1]
    # An environment that opens with more than the prompt.
    assert contexts.read(make_attempt(prompt=[*prompt, 8])) == "user hint one assistant right"
    assert contexts.read(make_attempt(prompt=prompt)) == "user hint one assistant"


def test_a_further_row_that_changes_the_prompt_has_no_place_for_the_context(tmp_path: Path, tokenizer: Any) -> None:
    contexts = Contexts(tmp_path, tokenizer, ROWS, "{{ tip }} {{ prompt }}")
    message = r"trajectory 3: the further row at turn 2 does not begin with the prompt, .* teachers.main.context stands"
    with pytest.raises(RolloutError, match=message):
        contexts.row(make_attempt(prompt=[2, 11, 8], turn=1, episode_id=3, trajectory_id=3))


def test_a_masked_row_names_one_version_and_keeps_no_candidates(tmp_path: Path, tokenizer: Any) -> None:
    fields = {
        "max_policy_version": 1,
        "version_changes": np.array([2], np.int32),
        "candidate_ids": np.ones((3, 2), np.int32),
        "candidate_rollout_logprobs": np.full((3, 2), -1, np.float32),
    }
    contexts = Contexts(tmp_path, tokenizer, ROWS, SDPO)
    batch = make_generated([contexts.row(make_attempt(0, **fields))])
    assert (batch["max_policy_version"].to_pylist(), batch["candidate_ids"].to_pylist()) == ([0], [[]])


def test_an_evaluation_builds_what_is_known_of_the_prompt_alone_and_masks_nothing(
    tmp_path: Path, tokenizer: Any
) -> None:
    attempts, of_prompt = Contexts(tmp_path, tokenizer, ROWS, SDPO), Contexts(tmp_path, tokenizer, ROWS, "{{ tip }}")
    group = make_group(("right", 1.0), ("right", 1.0))
    row = attempts.row(group[0], group, use="of_prompt")
    assert (row.scorer_prompts["teacher"].tolist(), row.loss_mask.sum()) == ([], 3)
    assert len(of_prompt.row(group[0], group, use="of_prompt").scorer_prompts["teacher"]) == 3
    assert len(of_prompt.row(group[0], group, use="none").scorer_prompts["teacher"]) == 0


def test_a_teacher_answers_held_out_prompts_itself_with_its_context(tmp_path: Path, tokenizer: Any) -> None:
    contexts = Contexts(tmp_path, tokenizer, ROWS, "{{ prompt }} {{ tip }}")
    own = prompts_with_contexts(contexts.plan.settings, "main", contexts.prompts, [1], tokenizer)
    assert own is not None
    assert [tokenizer.decode(own.prompt(number).token_ids) for number in (0, 1)] == [
        "user one assistant",
        "user two right assistant",
    ]
    attempts = Contexts(tmp_path, tokenizer, ROWS, SDPO)
    assert prompts_with_contexts(attempts.plan.settings, "main", attempts.prompts, [1], tokenizer) is None


def test_attempts_are_cut_to_the_room_and_what_still_does_not_fit_is_masked(tmp_path: Path, tokenizer: Any) -> None:
    long = " ".join(["right"] * 30)
    group = make_group((long, 1.0), ("wrong", 0.0))
    contexts = Contexts(tmp_path, tokenizer, ROWS, SDPO, "teachers.main.context.max_tokens=16")
    row = contexts.row(group[1], group)
    assert 3 < len(row.scorer_prompts["teacher"]) <= 16
    assert contexts.read(group[1], group).startswith("user one right right")
    assert contexts.metrics(group[1], group)["context/cut_ratio"] == 1
    assert contexts.plan.prompt_tokens == {"main": 12}  # user one 0 assistant, and a completion of 8


def test_a_shuffled_context_is_that_of_another_prompt(tmp_path: Path, tokenizer: Any) -> None:
    shuffled = Contexts(tmp_path, tokenizer, ROWS, "{{ prompt }} {{ tip }}", "teachers.main.shuffled_context=true")
    assert [shuffled.read(make_attempt(index)) for index in (0, 1)] == [
        "user one right assistant",
        "user two hint assistant",
    ]
    attempts = Contexts(tmp_path, tokenizer, ROWS, SDPO, "teachers.main.shuffled_context=true")
    first = make_group(("right", 1.0), ("reads right", 1.0), prompt_id=0)
    second = make_group(("terse", 1.0), ("wrong", 0.0), prompt_id=1)
    assert [len(attempts.row(attempt, first).rollout_logprobs) for attempt in first] == [0, 0]  # there is none yet
    assert [attempts.read(attempt, second) for attempt in second] == ["user two reads right assistant"] * 2


def test_contexts_of_several_models_stand_beside_each_other(tmp_path: Path, tokenizer: Any) -> None:
    overrides = (
        "teachers.main.base=first",
        "teachers.first={model='base', context={template='{{ answer }}'}}",
        "objective.support=sampled",
        "objective.terms={main={loss='policy_gradient', target={teacher=1.0, base=-1.0}}}",
    )
    config = run_config("{{ tip }}", *overrides)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prompts = load_prompts(tmp_path / "p.jsonl", tokenizer, config, CONTEXT_TOKENS)
    plan = plan_contexts(config, prompts, tokenizer, {"main": 64, "first": 64}, NOW)
    assert plan.settings is not None
    row, _ = ContextBuilder(plan.settings, tokenizer, prompts).add(make_attempt(0), (), "all")
    assert {model: tokenizer.decode(ids) for model, ids in row.scorer_prompts.items()} == {
        "teacher": "user hint assistant",
        "base": "user two assistant",
    }


@pytest.mark.parametrize(
    ("template", "overrides", "sentence"),
    [
        (
            "{{ tipp }}",
            (),
            r"main\.context: the template reads `tipp`, and no prompt has such a column; there are tip,",
        ),
        ("{{ tip.length }}", (), r"main\.context: the prompt 'one': the template fails: .*no attribute 'length'"),
        ("a\n{% if %}", (), r"main\.context: line 2: Expected an expression"),
        ("{% if 0 %}{{ tip }}{% endif %}", (), r"none of the 2 prompts has one, so nothing would be learned from"),
        ("{{ attempt }}", ("rollout.samples_per_prompt=1",), r"samples_per_prompt = 1 gives none; raise it"),
        ("{{ ''.__class__.__mro__ }}", (), r"the template fails: access to attribute '__class__' .* is unsafe"),
        ("{{ (tip ~ ' ') * 80 }}", (), r"2 of 2 prompts have no room for it: the prompt 'one' has 82 tokens .* of 55"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_starts(
    tmp_path: Path, tokenizer: Any, template: str, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(PreceptorError, match=sentence) as caught:
        Contexts(tmp_path, tokenizer, ROWS, template, *overrides)
    assert "\n" not in str(caught.value)


def test_prompts_without_a_context_are_counted_at_the_start(tmp_path: Path, tokenizer: Any) -> None:
    contexts = Contexts(
        tmp_path, tokenizer, [*ROWS, {"prompt": "three"}], "{% if tip is defined %}{{ tip }}{% endif %}"
    )
    assert contexts.plan.notes == ("teachers.main.context: 1 of 3 prompts have none, and nothing is learned from them",)
    assert contexts.row(make_attempt(2)).loss_mask.sum() == 0


def test_a_template_may_stand_in_a_file_and_the_run_keeps_its_text(tmp_path: Path) -> None:
    file = tmp_path / "hint.jinja"
    file.write_text("{{ prompt }}\n{{ tip }}")
    context = run_config(str(file)).teachers["main"].context
    assert context is not None
    assert context.template == "{{ prompt }}\n{{ tip }}"
    with pytest.raises(ConfigError, match=r"teachers\.main\.context: template 'absent.jinja' is neither a file nor"):
        run_config("absent.jinja")
    with pytest.raises(ConfigError, match=r"teachers\.main: shuffled_context = true, but there is no context"):
        make_config("teachers.main.shuffled_context=true")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42. " + "Work follows here. " * 20, True),
        ("Work comes first here. " * 20 + "So it is 42.", False),
        ("Work comes first here, and 421 is no answer. " * 3, None),
        ("42", None),
    ],
)
def test_an_answer_before_any_work_is_early(text: str, expected: bool | None) -> None:
    assert answers_early(text, "42", "6 * 7") is expected
    assert answers_early(text, "42", "is it 42?") is None
