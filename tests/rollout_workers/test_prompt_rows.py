"""What the student reads of a row: columns, chat templates and their arguments, conversations, and what is skipped."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.contracts.errors import PromptError
from rollout_workers.load_prompts import load_prompts
from rollout_workers.prompts import PromptSet
from tests.builders import make_config

TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.name }} {% endfor %}"
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% if enable_thinking is not defined or enable_thinking %}"
    "think {% endif %}{% endif %}"
)
WORDS = ["<unk>", *["tool", "user", "system", "assistant", "end", "think", "one", "two", "three", "terse"]]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=TEMPLATE)


class Loaded:
    """Holds prompts as words, and the lines that were said."""

    def __init__(self, source: Path, tokenizer: PreTrainedTokenizerFast, *overrides: str, **options: Any) -> None:
        config = make_config("rollout.max_completion_tokens=8", *overrides)
        self.lines: list[str] = []
        self.prompts: PromptSet = load_prompts(source, tokenizer, config, 32, say=self.lines.append, **options)
        ids = [self.prompts.prompt(index).token_ids for index in range(len(self.prompts))]
        self.words = [" ".join(WORDS[token] for token in prompt) for prompt in ids]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWERED = [user("one"), {"role": "assistant", "content": "two"}]


def test_arguments_of_the_chat_template_come_from_the_run_file_and_first_from_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, {"prompt": "one"}, {"prompt": "one", "chat_template_kwargs": {"enable_thinking": True}})
    assert Loaded(path, tokenizer).words == ["user one end assistant think"] * 2
    loaded = Loaded(path, tokenizer, "prompts.chat_template_kwargs.enable_thinking=false")
    assert loaded.words == ["user one end assistant", "user one end assistant think"]
    assert loaded.lines == []


def test_an_argument_that_the_template_never_reads_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, {"prompt": "one"})
    loaded = Loaded(path, tokenizer, "prompts.chat_template_kwargs.enable_thinkin=false")
    assert loaded.lines == [
        f"{path}: 1 prompts; the chat template never reads enable_thinkin of prompts.chat_template_kwargs"
    ]


@pytest.mark.parametrize("is_json", [False, True])
def test_the_tools_of_a_row_reach_the_chat_template(
    is_json: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tools = [{"name": "three", "parameters": {}}]
    path = write(tmp_path, {"prompt": "one", "tools": json.dumps(tools) if is_json else tools})
    assert Loaded(path, tokenizer).words == ["tool three user one end assistant think"]
    assert not Loaded(path, tokenizer).lines
    tokenizer.chat_template = TEMPLATE.replace("tools", "functions")
    [line] = Loaded(path, tokenizer).lines
    assert line.endswith("warning: the chat template never reads tools, so the student is not told of any")


def test_a_conversation_that_ends_with_the_answer_is_refused_cut_or_continued(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, {"messages": ANSWERED}, {"messages": [user("one")]})
    with pytest.raises(PromptError, match=r'p\.jsonl:1: .*ends with the assistant.*prompts\.last_answer = "drop"'):
        Loaded(path, tokenizer)
    dropped = Loaded(path, tokenizer, "prompts.last_answer=drop")
    assert dropped.words == ["user one end assistant think"] * 2
    assert dropped.lines[0].endswith("1 end with the assistant's message, which is left out")
    continued = Loaded(path, tokenizer, "prompts.last_answer=prefill")
    assert continued.words == ["user one end assistant two", "user one end assistant think"]


@pytest.mark.parametrize(
    "conversation",
    [
        json.dumps([{"role": "system", "content": "terse"}, user("one")]),
        [{"from": "system", "value": "terse"}, {"from": "human", "value": "one"}],
        json.dumps([{"from": "system", "value": "terse"}, {"from": "human", "value": "one"}]),
    ],
    ids=["JSON text", "ShareGPT", "ShareGPT as JSON text"],
)
def test_a_conversation_may_be_json_text_or_sharegpts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, conversation: Any
) -> None:
    loaded = Loaded(write(tmp_path, {"prompt": conversation}), tokenizer)
    assert loaded.words == ["system terse end user one end assistant think"]
    assert loaded.prompts.text(0) == "one"


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[{"role": ', "[{}]", "[one]"])
def test_a_text_that_only_looks_like_a_conversation_stays_a_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert Loaded(write(tmp_path, {"prompt": text}), tokenizer).prompts.text(0) == text
    raw = json.dumps([user("one")])
    assert Loaded(write(tmp_path, {"prompt": raw}), tokenizer, "prompts.template=raw").prompts.text(0) == raw


def test_text_parts_are_one_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    loaded = Loaded(write(tmp_path, {"prompt": [user(parts)]}), tokenizer)
    assert loaded.words == ["user one two end assistant think"]
    assert loaded.prompts.text(0) == "one two"


def test_a_conversations_own_system_message_comes_before_the_run_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = {"role": "system", "content": "three"}
    path = write(tmp_path, {"prompt": [own, user("one")]}, {"prompt": "one"})
    loaded = Loaded(path, tokenizer, "prompts.system_prompt=terse")
    assert loaded.words == [f"system {word} end user one end assistant think" for word in ("three", "terse")]
    assert loaded.lines == [f"{path}: 2 prompts; 1 keep their own system message in the place of prompts.system_prompt"]


def test_all_rows_that_cannot_be_used_are_counted_and_the_first_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "one"} for _ in range(1000)]
    rows[16] = rows[99] = {"prompt": None}
    rows[200] = {"prompt": "one " * 40}
    rows[201] = {"prompt": ""}
    with pytest.raises(PromptError) as caught:
        Loaded(write(tmp_path, *rows), tokenizer)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert message.startswith("p.jsonl: 4 of 1,000 prompts cannot be used; first: p.jsonl:17: `prompt` is null; ")
    assert "p.jsonl:100: `prompt` is null" in message
    assert "p.jsonl:202: `prompt` is empty" in message


def test_prompts_that_are_too_long_are_refused_or_skipped_with_their_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, *[{"prompt": "one"}] * 5, {"prompt": "one " * 40}, {"prompt": "two"})
    with pytest.raises(PromptError, match=r'p\.jsonl:6: the prompt has 44 tokens, .* room for 23; .*= "skip"'):
        Loaded(path, tokenizer)
    skipped = Loaded(path, tokenizer, "prompts.too_long=skip")
    assert [len(skipped.prompts), skipped.prompts.text(5)] == [6, "two"]
    assert skipped.lines == [f"{path}: 6 prompts; 1 of 7 are skipped, because they are too long"]
    with pytest.raises(PromptError, match="all of the 1 prompts are too long"):
        Loaded(write(tmp_path, {"prompt": "one " * 40}), tokenizer, "prompts.too_long=skip")


@pytest.mark.parametrize(
    ("answer", "expected"), [(4, "4"), (4.0, "4"), (0.5, "0.5"), ("4.0", "4.0"), (float("nan"), None), (None, None)]
)
def test_a_number_is_an_answer_as_its_text(
    answer: object, expected: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pq.write_table(pa.table({"prompt": ["one"], "answer": [answer]}), tmp_path / "p.parquet")
    assert Loaded(tmp_path / "p.parquet", tokenizer).prompts.prompt(0).answer == expected


def test_columns_are_read_under_the_names_that_the_run_file_gives(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"question": "one", "reward_model": {"ground_truth": "2 + 2 = 4 #### 4"}, "level": 3, "long": "x"}
    names = ("prompts.columns.prompt=question", "prompts.columns.answer=reward_model.ground_truth")
    path = write(tmp_path, row)
    loaded = Loaded(
        path, tokenizer, *names, "prompts.answer_after=####", "prompts.columns.level=level", "environment.kind=a:B"
    )
    assert loaded.words == ["user one end assistant think"]
    assert (loaded.prompts.prompt(0).answer, loaded.prompts.prompt(0).columns) == ("4", {"level": 3})
    with pytest.raises(PromptError, match="no row has `levle`"):
        Loaded(path, tokenizer, *names, "prompts.columns.level=levle")


def test_verls_format_is_read_as_it_is_and_its_null_prompts_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [user("one")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"index": 7, "split": "train"},
    }
    path = tmp_path / "verl.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    loaded = Loaded(path, tokenizer, "environment.kind=a:B")
    prompt = PromptSet.from_wire(loaded.prompts.to_wire()).prompt(0)
    assert loaded.words == ["user one end assistant think"]
    assert (prompt.answer, prompt.domain) == ("72", "openai/gsm8k")
    assert {"ability", "reward_model", "extra_info"} <= set(prompt.columns)
    assert prompt.columns["extra_info"] == {"index": 7, "split": "train"}
    pq.write_table(pa.Table.from_pylist([row, {**row, "prompt": None}, {**row, "prompt": None}]), path)
    with pytest.raises(PromptError, match=r"2 of 3 prompts cannot be used; they: .*row 2: `prompt` is null; .*row 3"):
        Loaded(path, tokenizer)


def test_a_column_teacher_that_names_none_of_the_runs_is_not_read_where_there_is_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Data sets say by it who wrote an answer."""
    path = write(tmp_path, {"prompt": "one", "teacher": "gpt"}, {"prompt": "two", "teacher": "claude"})
    loaded = Loaded(path, tokenizer)
    assert [loaded.prompts.teacher(row) for row in range(2)] == ["main", "main"]
    said = "the column teacher (claude, gpt) is not read, for the run has one teacher, and none of these"
    assert loaded.lines == [f"{path}: 2 prompts; {said}"]
    for other in ({"prompt": "three"}, {"prompt": "three", "teacher": "main"}):
        path = write(tmp_path, other, {"prompt": "two", "teacher": "mian"})
        with pytest.raises(
            PromptError, match=r"p.jsonl:2: teacher is 'mian'; expected .*prompts.columns.teacher names"
        ):
            Loaded(path, tokenizer)


def test_further_columns_are_named_and_not_kept_where_nothing_reads_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path, {"prompt": "one", "answr": "x"}, {"prompt": "one"})
    loaded = Loaded(path, tokenizer)
    assert loaded.lines == [f"{path}: 2 prompts; nothing reads the columns answr"]
    assert loaded.prompts.prompt(0).columns == {}
    assert Loaded(path, tokenizer, "environment.rewards={'a:f'=1}").prompts.prompt(0).columns == {"answr": "x"}


def test_a_template_that_writes_the_time_writes_the_one_that_it_is_given(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ strftime_now('%H:%M:%S') }} {{ m['content'] }} {% endfor %}"
    tokenizer.add_tokens(["12:30:59"])
    WORDS_AND_TIME = [*WORDS, "12:30:59"]
    config = make_config("rollout.max_completion_tokens=8")
    prompts = load_prompts(
        write(tmp_path, {"prompt": "one"}), tokenizer, config, 32, now=datetime(2026, 1, 1, 12, 30, 59)
    )
    assert [WORDS_AND_TIME[token] for token in prompts.prompt(0).token_ids] == ["12:30:59", "one"]
