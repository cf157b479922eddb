import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cluster.contracts.errors import PromptError
from rollout_workers.load_prompts import load_prompts
from rollout_workers.prompts import PromptOrder, PromptSet, sampling_seed
from tests.builders import make_config

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "user", "system", "one", "two", "three", "terse"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=CHAT_TEMPLATE)


def write_prompts(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, *overrides: str) -> PromptSet:
    config = make_config("rollout.max_completion_tokens=8", *overrides)
    return load_prompts(path, tokenizer, config, context_tokens=16)


def test_a_raw_prompt_is_tokenised_as_it_stands(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one two", "answer": "three", "domain": "count"})
    prompts = load(path, tokenizer, "prompts.template=raw")
    assert prompts.prompt(0).token_ids.tolist() == [3, 4]
    assert (prompts.prompt(0).answer, prompts.domain(0), prompts.teacher(0)) == ("three", "count", "main")


def test_the_chat_template_and_system_prompt_are_applied(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"})
    prompts = load(path, tokenizer, "prompts.system_prompt=terse")
    assert prompts.prompt(0).token_ids.tolist() == [2, 6, 1, 3]  # system terse user one


def test_special_tokens_come_from_the_tokenizer_or_from_the_chat_template_and_never_from_both(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="system $A", special_tokens=[("system", 2)])
    adding = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", chat_template=CHAT_TEMPLATE)
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"})
    assert load(path, adding, "prompts.template=raw").prompt(0).token_ids.tolist() == [2, 3]
    assert load(path, adding).prompt(0).token_ids.tolist() == [1, 3]  # user one


def test_a_conversation_keeps_its_roles(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "terse"}, {"role": "user", "content": "two"}]
    prompts = load(write_prompts(tmp_path / "p.jsonl", {"prompt": messages}), tokenizer)
    assert prompts.prompt(0).token_ids.tolist() == [2, 6, 1, 4]


def test_a_teacher_with_its_own_tokenizer_reads_the_messages_in_its_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        unk_token="<unk>",
        chat_template="{% for message in messages %}three {{ message['content'] }} three{% endfor %}",
    )
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": "two"})
    config = make_config("rollout.max_completion_tokens=8")
    prompts = load_prompts(path, tokenizer, config, 16, teacher_tokenizers={"main": own})
    [first, second] = PromptSet.from_wire(prompts.to_wire()).prompt(0), prompts.prompt(1)
    assert first.token_ids.tolist() == [1, 3]  # user one
    assert first.teacher_token_ids is not None
    assert first.teacher_token_ids.tolist() == [5, 3, 5]  # three one three
    assert second.teacher_token_ids is not None
    assert (second.teacher_token_ids.tolist(), prompts.longest_of("main")) == ([5, 4, 5], 3)
    plain = prompts.without_teachers_tokens()
    assert (plain.prompt(0).teacher_token_ids, plain.prompt(1).token_ids.tolist()) == (None, [1, 4])
    assert load(path, tokenizer).prompt(0).teacher_token_ids is None


def test_a_teacher_without_a_chat_template_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"})
    with pytest.raises(PromptError, match=r"teachers.main: its tokenizer has no chat template"):
        load_prompts(path, tokenizer, make_config(), 600, teacher_tokenizers={"main": bare})


def test_the_wire_returns_the_same_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"}, {"prompt": "two three", "answer": "x"})
    prompts = PromptSet.from_wire(load(path, tokenizer).to_wire())
    assert len(prompts) == 2
    assert prompts.prompt(0).answer is None
    assert prompts.text(1) == "two three"


def test_joined_sets_number_the_later_prompts_after_the_earlier(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    parts = [load(write_prompts(tmp_path / "p.jsonl", {"prompt": word}), tokenizer) for word in ("one", "two")]
    assert [PromptSet.join(parts).text(i) for i in range(2)] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not a prompt object"),
        ({"domain": "x"}, "there is no `prompt`; the columns are domain"),
        ({"prompt": "  "}, "`prompt` is empty"),
        ({"prompt": "one " * 8}, "the prompt has 9 tokens, but a context of 16 .* leaves room for 7"),
        ({"prompt": "one", "teacher": "other"}, r"teacher is 'other'; expected one of \['main'\]"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: object, sentence: str
) -> None:
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"}, line, {"prompt": "two"})
    with pytest.raises(PromptError, match=rf"p\.jsonl:2: {sentence}"):
        load(path, tokenizer)


def test_a_missing_and_an_empty_file_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PromptError, match=r"absent\.jsonl: cannot read the prompt file"):
        load(tmp_path / "absent.jsonl", tokenizer)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(PromptError, match=r"empty\.jsonl: the file holds no prompt"):
        load(tmp_path / "empty.jsonl", tokenizer)


def test_a_prompt_needs_a_route_when_there_are_two_teachers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "one"})
    with pytest.raises(PromptError, match="teacher is None; expected one of"):
        load(path, tokenizer, "teachers.second.model=b")


def test_every_epoch_asks_every_prompt_once_in_its_own_order() -> None:
    order = PromptOrder(num_prompts=10, seed=0, shuffle=True)
    first, second = order.take(0, 10), order.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_taking_in_parts_is_taking_at_once() -> None:
    order = PromptOrder(num_prompts=7, seed=3, shuffle=True)
    assert order.take(0, 20) == [*order.take(0, 3), *order.take(3, 11), *order.take(14, 6)]


def test_seeds_differ_by_every_part_of_their_key_and_repeat_for_the_same() -> None:
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({sampling_seed(*key) for key in keys}) == len(keys)
    assert sampling_seed(5, 6, 7, 8) == sampling_seed(5, 6, 7, 8)
    assert all(0 <= sampling_seed(*key) < 2**63 for key in keys)


def test_prompts_of_two_sets_are_shared_where_all_their_tokens_are_the_same() -> None:
    some = PromptSet.of_token_ids([[1, 2], [1], [2, 1], [1, 2, 3], [1, 2]], "main")
    assert some.num_shared(PromptSet.of_token_ids([[1, 2], [3], [1, 2, 3, 4]], "main")) == 2
    assert some.num_shared(PromptSet.of_token_ids([], "main")) == 0
    assert PromptSet.of_token_ids([], "main").num_shared(some) == 0
