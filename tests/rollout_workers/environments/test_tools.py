"""The tools environment: what the student reads of calls, and what of a conversation is tokenised anew."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.config.sections import EnvironmentConfig, PromptsConfig
from cluster.contracts.errors import ConfigError
from cluster.contracts.requests import Completion, RolloutRequest, SamplingSettings
from cluster.contracts.trajectory import ragged
from examples.calculator.task import build_tokenizer
from rollout_workers.environments.base import Services
from rollout_workers.environments.chat import Chat, Conversation
from rollout_workers.environments.tool_calls import hermes_calls, json_calls, reader_of, tool_schemas
from rollout_workers.environments.tools import Tools
from rollout_workers.environments.verifier_process import VerifierProcess
from rollout_workers.episode import Limits
from rollout_workers.load_prompts import load_prompts
from rollout_workers.prompt_row import PromptRow
from rollout_workers.prompts import PromptSet
from rollout_workers.worker import RolloutWorker
from tests.builders import make_config

OWN = "tests.rollout_workers.environments.own_tools"
PATHS = tuple(f"{OWN}:{name}" for name in ("repeat", "divide", "wait", "crash"))
CALCULATOR = ("examples.calculator.tools:multiply", "examples.calculator.tools:add")
NOW = datetime(2026, 1, 1)
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


@pytest.fixture(scope="module")
def process() -> Iterator[VerifierProcess]:
    process = VerifierProcess(tools=PATHS)
    yield process
    process.close()


def results_of(process: VerifierProcess, *calls: tuple[str, dict[str, Any]], seconds: float = 60.0) -> list[str]:
    async def call_all() -> list[str]:
        return [await process.call_tool(f"{OWN}:{name}", arguments, seconds) for name, arguments in calls]

    return asyncio.run(call_all())


def test_a_tool_answers_with_its_text_or_json_and_its_errors_are_an_answer_too(process: VerifierProcess) -> None:
    assert results_of(
        process,
        ("repeat", {"text": "ab", "times": 3}),
        ("divide", {"a": 1, "b": 4}),
        ("divide", {"a": 1, "b": 0}),
        ("repeat", {"words": "ab"}),
    ) == [
        "ababab",
        '{"quotient": 0.25}',
        "error: ZeroDivisionError: division by zero",
        "error: TypeError: repeat() got an unexpected keyword argument 'words'",
    ]


def test_a_tool_that_takes_too_long_or_ends_its_process_harms_no_later_call(process: VerifierProcess) -> None:
    assert results_of(process, ("wait", {"seconds": 30}), seconds=0.2) == [
        "error: the tool took longer than 0.2 seconds"
    ]
    assert results_of(process, ("crash", {}), ("repeat", {"text": "x"})) == ["error: the tool ended its process", "xx"]


def test_calls_are_read_in_the_formats_of_models() -> None:
    two = f"Both: {CALL}\n{CALL.replace('add', 'multiply')}"
    assert [call["name"] for call in hermes_calls(two)] == ["add", "multiply"]
    assert hermes_calls("3") == []
    [cut_off] = hermes_calls('<tool_call>{"name": "add"')
    assert cut_off["error"].startswith("the call is not JSON")
    assert hermes_calls('<tool_call>{"name": 3}</tool_call>') == [
        {"error": 'the call is no object with "name" and "arguments"'}
    ]
    assert hermes_calls('<tool_call>{"name": "add", "arguments": [1]}</tool_call>') == [
        {"error": "the arguments of add are no object"}
    ]
    assert json_calls('[{"name": "add", "arguments": {}}]') == [{"name": "add", "arguments": {}}]
    assert json_calls('{"name": add}')[0]["error"].startswith("the call is not JSON")


@pytest.mark.slow
def test_a_parser_of_vllm_reads_what_ours_reads() -> None:
    read = reader_of("xlam", build_tokenizer())
    assert read('[{"name": "add", "arguments": {"a": 1, "b": 2}}]') == [{"name": "add", "arguments": {"a": 1, "b": 2}}]
    assert read("3") == []
    with pytest.raises(ConfigError, match="tool_format is 'morse'; expected hermes, json or a name of vLLM's"):
        reader_of("morse")


def test_schemas_follow_from_signatures_and_docstrings() -> None:
    [schema] = tool_schemas((f"{OWN}:repeat",))
    assert schema["function"]["name"] == "repeat"
    assert schema["function"]["description"] == "Repeat a text."
    assert schema["function"]["parameters"]["required"] == ["text"]
    assert schema["function"]["parameters"]["properties"]["times"] == {"type": "integer", "description": "how often"}
    for paths, sentence in (
        ((f"{OWN}:undocumented",), "undocumented has no schema: .*needs type hints and a docstring with Args"),
        ((f"{OWN}:repeat", f"{OWN}:repeat"), "two tools have the same name: repeat, repeat; rename one"),
        (("repeat",), "environment.tools names 'repeat'; expected package.module:function"),
        ((f"{OWN}:none",), "'.*:none' as a tool cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            tool_schemas(paths)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["environment.kind=tools"], "has no tools; name functions in environment.tools"),
        (['environment.tools=["a:b"]'], "set environment.kind = 'tools'"),
        (["environment.kind=tools", 'environment.tools=["a:b"]', "prompts.template=raw"], "set prompts.template"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_config(*overrides)


def chat_with(template: str | None = None) -> Chat:
    tokenizer = build_tokenizer()
    if template is not None:
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
        tokenizer.chat_template = template
    return Chat(tokenizer, PromptsConfig("none"), NOW)


THOUGHTLESS = """
{%- for message in messages %}<|{{ message.role }}|>
{%- if message.role == "assistant" and not loop.last %}{{ message.content.split("+")[-1] }}
{%- else %}{{ message.content }}{% endif %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_what_follows_is_tokenised_once_and_a_template_that_rewrites_the_past_gives_the_whole_text() -> None:
    row = PromptRow("1+2")
    for template, expected, is_expected_whole in (
        (None, "<|tool|>3<|end|><|assistant|>", False),
        (THOUGHTLESS, "<|user|>1+2<|end|><|assistant|>4<|end|><|tool|>3<|end|><|assistant|>", True),
    ):
        chat = chat_with(template)
        conversation = Conversation(chat, row)
        assert conversation.add_completion(chat.encode("7+4<|end|>")) == "7+4"
        token_ids, is_whole = conversation.add([{"role": "tool", "content": "3"}])
        assert (chat.decode(token_ids), is_whole) == (expected, is_expected_whole)


class Writing:
    """A stub engine that writes given texts, one a turn; it counts the prompts' tokens that no call before had."""

    def __init__(self, chat: Chat, *texts: str) -> None:
        self.prompts: list[list[int]] = []
        self._chat, self._texts = chat, iter(texts)

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        self.prompts.append(list(prompt_ids))
        ids = self._chat.encode(next(self._texts))
        return Completion(ids, np.full(len(ids), -1, np.float32), "stop", np.zeros(len(ids), np.int32))


def run_tools(*texts: str, tools: tuple[str, ...] = CALCULATOR, answer: str = "3") -> tuple[Any, Writing, Chat]:
    chat = chat_with()
    row = PromptRow("1+2", answer=answer, tools=tool_schemas(tools))
    settings = EnvironmentConfig("tools", tools=tools, tool_seconds=60.0)
    prompts = PromptSet.of_columns(
        {
            "token_ids": [chat.encode(chat.text(row, []))],
            "text": [row.text],
            "answer": [answer],
            "domain": [""],
            "teacher": ["main"],
            "columns": [None],
            "source": [msgspec.json.encode(row).decode()],
        }
    )
    engine = Writing(chat, *texts)
    services = Services(chat.encode, lambda ids: chat.content(ids), VerifierProcess(), settings=settings, chat=chat)
    worker = RolloutWorker(engine, services, 1, Tools, Limits(200))  # type: ignore[arg-type]
    worker.set_prompts(prompts)

    async def collect() -> Any:
        sampling = SamplingSettings(100, 1.0)
        [(batch, _, _)] = [one async for one in worker.generate([RolloutRequest(0, 0, 0, 1)], sampling)]
        return batch

    batch = asyncio.run(collect())
    services.verifier.close()
    return batch, engine, chat


def test_the_student_reads_the_result_of_its_call_after_the_very_tokens_of_its_call() -> None:
    batch, engine, chat = run_tools(f"{CALL}<|end|>", "3<|end|>")
    prompt = "<|tools|>multiply add<|end|><|user|>1+2<|end|><|assistant|>"
    assert chat.decode(ragged(batch, "token_ids")[0]) == (f"{prompt}{CALL}<|end|><|tool|>3<|end|><|assistant|>3<|end|>")
    written = ragged(batch, "token_ids")[0][ragged(batch, "loss_mask")[0] == 1]
    assert chat.decode(written) == f"{CALL}<|end|>3<|end|>"
    assert batch["reward"].to_pylist() == [1.0]
    # The second turn's prompt begins with the first's and what it wrote, so an engine's prefix cache has it.
    first, second = engine.prompts
    assert second[: len(first)] == first


@pytest.mark.parametrize(
    "call", [CALL.replace("add", "multiply").replace('"b"', '"a"'), CALL.replace(", ", "+"), '<tool_call>{"name": "']
)
def test_a_wrong_call_is_answered_with_what_is_wrong_and_the_episode_goes_on(call: str) -> None:
    batch, engine, chat = run_tools(f"{call}<|end|>", "3<|end|>")
    assert (batch["finish_reason"].to_pylist(), batch["reward"].to_pylist()) == (["stop"], [1.0])
    read = chat.decode(np.array(engine.prompts[1][len(engine.prompts[0]) :]))
    assert "<|end|><|tool|><unk>" in read  # the letters of the error
    assert read.endswith("<|end|><|assistant|>")


def test_an_answer_without_a_call_is_rewarded_at_once() -> None:
    for answer, reward in (("3", 1.0), ("4", 0.0)):
        batch, engine, _ = run_tools(f"{answer}<|end|>")
        assert batch["reward"].to_pylist() == [reward]
        assert len(engine.prompts) == 1


def test_prompts_are_rendered_with_the_tools_unless_a_row_has_its_own(tmp_path: Path) -> None:
    own = tool_schemas(CALCULATOR[:1])
    lines = [{"prompt": "1+2", "answer": "3"}, {"prompt": "4", "tools": own}]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = make_config("environment.kind=tools", f"environment.tools={json.dumps(CALCULATOR)}")
    chat = chat_with()
    prompts = load_prompts(tmp_path / "train.jsonl", build_tokenizer(), config, context_tokens=4096)
    texts = [chat.decode(prompts.prompt(number).token_ids) for number in (0, 1)]
    assert texts == [
        "<|tools|>multiply add<|end|><|user|>1+2<|end|><|assistant|>",
        "<|tools|>multiply<|end|><|user|>4<|end|><|assistant|>",
    ]
    # The row is there for the turns that follow.
    rows = [prompts.prompt(number).row for number in (0, 1)]
    assert [row and chat.text(row, []) for row in rows] == texts
    plain = load_prompts(tmp_path / "train.jsonl", build_tokenizer(), make_config(), context_tokens=4096)
    assert plain.prompt(0).row is None
