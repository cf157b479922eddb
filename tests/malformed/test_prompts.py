"""Wrong prompt files end in one sentence that names file and line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from cluster.contracts.errors import PromptError
from cluster.models.model_files import load_tokenizer
from rollout_workers.load_prompts import load_prompts
from rollout_workers.prompts import PromptSet
from tests.builders import make_config
from tests.malformed.prompt_cases import PROMPTS
from tests.malformed.refusal import SECONDS_PER_CASE, assert_refused, assert_sentence
from tests.tiny_qwen3 import CONTEXT_TOKENS

pytestmark = pytest.mark.timeout(SECONDS_PER_CASE)


def load(
    path: Path, tokenizer: PreTrainedTokenizerBase, overrides: tuple[str, ...], template: str | None = None
) -> PromptSet:
    tokenizer.chat_template = template
    return load_prompts(path, tokenizer, make_config("rollout.max_completion_tokens=8", *overrides), CONTEXT_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


@pytest.mark.parametrize("name", PROMPTS)
def test_a_wrong_prompt_file_is_one_sentence(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    case = PROMPTS[name]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(case.content)
    assert_refused(lambda: load(path, tokenizer, case.overrides, case.template), PromptError, case.says, tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "No such file"),
        ("folder", "cannot load the data set: The directory"),
        ("loop", "Too many levels of symbolic links"),
        ("pipe", "not a regular file"),
        ("a\0b", "null byte"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_no_prompt_file_is_named(
    name: str, says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(lambda: load(tmp_path / name, tokenizer, ("prompts.template=raw",)), PromptError, says)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["prompt", "answer", "domain", "teacher", "role", "content"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.binary(max_size=40) | st.dictionaries(fields, values, max_size=4))
def test_whatever_a_line_holds_it_is_a_prompt_or_a_sentence(
    line: bytes | dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    try:
        prompts = load(path, tokenizer, ("prompts.template=raw",))
    except PromptError as error:
        assert_sentence(str(error), "prompts.jsonl")
    else:
        assert len(prompts) >= 1
        assert all(len(prompts.prompt(index).token_ids) for index in range(len(prompts)))
