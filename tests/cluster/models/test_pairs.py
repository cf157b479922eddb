"""Which teachers a student may have: what differs without harm, what is refused, and what follows for the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cluster.config.run_config import Config
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ConfigError, ModelError
from cluster.models.model_checks import ModelFacts, read_model
from cluster.models.pairs import Pair, by_role, compare
from cluster.run.inputs import held_out_sampling, load_inputs, train_sampling
from tests.builders import make_config
from tests.tiny_qwen3 import write_tiny_qwen3

TEXT, END = "<|endoftext|>", "<|im_end|>"  # as Qwen names them: of documents, and of turns


def make_tokenizer(words: str, added: str = "", **special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token="<unk>"))
    core.add_tokens([AddedToken(token, special=True) for token in added.split()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


def facts(words: str, added: str = "", stop_ids: tuple[int, ...] = (), **special: str) -> ModelFacts:
    return ModelFacts(make_tokenizer(words, added, **special), 64, 16, frozenset(stop_ids))


def qwen(*more: str, **of_family: str | tuple[int, ...]) -> ModelFacts:
    """Ids: 0 to 2 are words, 3 ends a document, 4 ends a turn."""
    return facts("<unk> a b", " ".join((TEXT, END, *more)), **of_family)


BASE = qwen(eos_token=TEXT, stop_ids=(3,))
INSTRUCT = qwen(eos_token=END, stop_ids=(4, 3), chat_template="x")


def pair(student: ModelFacts, teacher: ModelFacts, *accept: str, stop_ids: tuple[int, ...] = ()) -> Pair:
    return compare("math", TeacherConfig("m", accept_differences=accept), student, teacher, stop_ids)


def test_the_same_tokenizer_is_no_difference() -> None:
    assert pair(BASE, qwen(eos_token=TEXT)) == Pair(stop_ids=frozenset({3}))


class Reversed(PreTrainedTokenizerFast):
    """A tokenizer of a model's own code, whose vocabulary comes in another order."""

    def get_vocab(self) -> dict[str, int]:
        return dict(reversed(super().get_vocab().items()))


def test_the_order_in_which_a_tokenizer_lists_its_tokens_does_not_matter() -> None:
    core = BASE.tokenizer.backend_tokenizer
    teacher = ModelFacts(Reversed(tokenizer_object=core, unk_token="<unk>", eos_token=TEXT), 64, 16)
    assert list(teacher.tokenizer.get_vocab()) != list(BASE.tokenizer.get_vocab())
    assert pair(BASE, teacher) == Pair(stop_ids=frozenset({3}))


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        (facts("<unk> b a"), "token 'a' has id 1 for the student and 2 for the teacher, and 2 ids differ in all"),
        (facts("<unk> a c"), "id 2 is 'b' for the student and 'c' for the teacher, and 1 ids differ in all"),
        (facts("<unk> a"), r"only the student has 1 token \('b'\), not all of them added"),
        (facts("<unk> a b c"), r"only the teacher has 1 token \('c'\), not all of them added"),
        (facts("<unk> a b", eos_token="b"), r"its EOS is 'b', and the student's is None: .* = \[\"eos\"\], so that"),
        (facts("<unk> a b", "<x>", eos_token="<x>"), "its EOS '<x>' is a token that the student lacks"),
    ],
)
def test_a_difference_that_changes_what_ids_mean_is_refused(teacher: ModelFacts, sentence: str) -> None:
    with pytest.raises(ModelError, match=f"teachers.math: .*{sentence}"):
        pair(facts("<unk> a b"), teacher)


def test_ordinary_tokens_of_the_same_id_may_not_differ_whatever_is_accepted() -> None:
    with pytest.raises(ModelError, match="choose one that has the student's tokenizer"):
        pair(facts("<unk> a b"), facts("<unk> a c"), "tokens", "eos")


def test_added_tokens_may_have_other_names_where_the_run_file_says_so() -> None:
    renamed = facts("<unk> a b", f"{TEXT} <User>", eos_token=TEXT)
    with pytest.raises(
        ModelError, match=r"id 4 is '<\|im_end\|>' .* 1 added tokens differ in all; .* = \[\"tokens\"\]"
    ):
        pair(BASE, renamed)
    assert "1 added tokens differ (id 4 is '<|im_end|>' for the student" in pair(BASE, renamed, "tokens").accepted


def test_a_teacher_may_have_more_added_tokens_which_get_no_probability() -> None:
    thinking = qwen("<think>", "</think>", eos_token=TEXT)
    assert pair(BASE, thinking).excluded_ids == (5, 6)
    assert (
        "it gives no probability to 2 tokens ('<think>', ...) that the student lacks" in pair(BASE, thinking).accepted
    )
    assert pair(thinking, BASE).excluded_ids == ()
    assert "it does not know 2 tokens ('<think>', ...) of the student" in pair(thinking, BASE).accepted


def test_what_a_teacher_does_not_use_may_differ_in_one_line() -> None:
    teacher = qwen(eos_token=TEXT, chat_template="x", pad_token="a", bos_token="b")
    assert pair(BASE, teacher) == Pair(
        stop_ids=frozenset({3}),
        accepted="teachers.math: not used and different: its chat_template, bos_token, pad_token",
    )


def test_a_base_student_of_an_instruct_teacher_needs_a_word_in_the_run_file() -> None:
    with pytest.raises(ModelError, match=r"its EOS is '<\|im_end\|>', and the student's is '<\|endoftext\|>'"):
        pair(BASE, INSTRUCT)
    accepted = pair(BASE, INSTRUCT, "eos")
    assert accepted.stop_ids == {3, 4}
    assert "completions end at '<|im_end|>' too" in accepted.accepted
    # To stop at the teacher's EOS is the same word: the student's ends the teacher too.
    assert pair(BASE, INSTRUCT, stop_ids=(4,)).stop_ids == {3, 4}


def test_an_instruct_student_of_a_base_teacher_is_refused_too() -> None:
    with pytest.raises(ModelError, match=r"its EOS is '<\|endoftext\|>'"):
        pair(INSTRUCT, BASE)


def test_stop_ids_of_one_side_end_completions_of_both() -> None:
    more = qwen("<|eom|>", eos_token=TEXT, stop_ids=(3, 4))
    assert pair(qwen("<|eom|>", eos_token=TEXT), more).stop_ids == {3, 4}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    for name in ("student", "teacher"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "train.jsonl").write_text('{"prompt": "w4"}\n')
    return tmp_path


SHORT = ("prompts.template=raw", "rollout.max_completion_tokens=8")


def config(folder: Path, *overrides: str) -> Config:
    models = [f"student.model={folder / 'student'}", f"teachers.main.model={folder / 'teacher'}"]
    return make_config(
        *models,
        f"prompts.train={folder / 'train.jsonl'}",
        "prompts.template=raw",
        "rollout.max_completion_tokens=8",
        *overrides,
    )


def test_completions_end_where_either_model_does(folder: Path) -> None:
    """Word 3 is `halt`, and EOS is 1, which the engines of both stop at by themselves."""
    change(folder / "teacher" / "tokenizer_config.json", eos_token="halt")
    change(folder / "teacher" / "generation_config.json", eos_token_id=[3, 1])
    with pytest.raises(ModelError, match="its EOS is 'halt', and the student's is '<eos>'"):
        load_inputs(config(folder))
    accepting = config(folder, 'teachers.main.accept_differences=["eos"]')
    inputs = load_inputs(accepting)
    resolved = inputs.pairs.apply(accepting)
    assert train_sampling(resolved).stop_token_ids == (3,)
    assert train_sampling(resolved).stop_class == resolved.teachers["main"].stop_class == (1, 3)
    assert inputs.pairs.lines == (
        "teachers.main: completions end at 'halt' too",
        "'<eos>', 'halt' end completions and count as one token, the first (rollout.stop_class)",
    )
    assert load_inputs(resolved).pairs.apply(resolved) == resolved  # as a run that goes on has it


def test_completions_of_a_teacher_end_where_the_student_does(folder: Path) -> None:
    change(folder / "student" / "generation_config.json", eos_token_id=[1, 4])
    resolved = load_inputs(config(folder)).pairs.apply(config(folder))
    assert held_out_sampling(resolved).stop_token_ids == (4,)


def test_an_embedding_may_be_padded_further_than_the_students(folder: Path) -> None:
    change(folder / "teacher" / "config.json", vocab_size=128)
    weights = load_file(folder / "teacher" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    padded = torch.cat([embedding, torch.zeros(128 - len(embedding), embedding.shape[1])])
    save_file({**weights, "model.embed_tokens.weight": padded}, folder / "teacher" / "model.safetensors")
    inputs = load_inputs(config(folder))
    assert inputs.pairs.lines == ()
    assert inputs.pairs.apply(config(folder)) == config(folder)


def test_stop_ids_are_those_of_the_generation_settings_or_else_of_the_configuration(folder: Path) -> None:
    settings = folder / "student" / "generation_config.json"
    change(settings, eos_token_id=[3, 4])
    assert read_model(config(folder).student, is_student=True).stops == {1, 3, 4}
    settings.unlink()
    change(folder / "student" / "config.json", eos_token_id=5)
    assert read_model(config(folder).student, is_student=True).stops == {1, 5}


def test_a_student_that_teaches_itself_is_warned_about(folder: Path) -> None:
    itself = config(folder, f"teachers.main.model={folder}/./student")
    assert load_inputs(itself).pairs.lines == (
        "warning: teachers.main is the student's own model, from which it learns nothing",
    )


def test_a_student_that_is_meant_to_teach_itself_is_not(folder: Path) -> None:
    itself = [f"teachers.main.model={folder}/student", "teachers.main.from=student"]
    for refresh in ("frozen", "{ema=0.1}"):
        assert load_inputs(config(folder, *itself, f"teachers.main.refresh={refresh}")).pairs.lines == ()
    assert load_inputs(config(folder, *itself, "teachers.main.refresh=live")).pairs.lines == (
        "warning: teachers.main is the student of now and reads no context, so it teaches nothing",
    )


def test_the_tokens_of_one_teacher_are_excluded_by_all(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(folder / "teacher")
    two = config(folder, f"teachers.other.model={folder / 'student'}", "teachers.main.base=other")
    resolved = load_inputs(two).pairs.apply(two)
    assert {name: teacher.excluded_token_ids for name, teacher in resolved.teachers.items()} == {
        "main": (112,),
        "other": (112,),
    }


def test_the_students_eos_stands_for_all_ids_that_end_completions_and_the_run_file_may_say_another(
    folder: Path,
) -> None:
    change(folder / "student" / "generation_config.json", eos_token_id=[1, 4])
    several = load_inputs(config(folder))
    assert several.pairs.stop_class == (1, 4)
    named = load_inputs(config(folder, "rollout.stop_token_ids=[6]"))
    assert named.pairs.stop_class == (1, 4, 6)
    written = config(folder, "rollout.stop_class=[4,1]")
    assert load_inputs(written).pairs.apply(written).teachers["main"].stop_class == (4, 1)
    off = config(folder, "rollout.stop_class=[]")
    resolved = load_inputs(off).pairs.apply(off)
    assert (resolved.rollout.stop_class, resolved.teachers["main"].stop_class) == ((), ())
    assert train_sampling(resolved).stop_class == held_out_sampling(resolved).stop_class == ()
    held_out = held_out_sampling(several.pairs.apply(config(folder)))
    assert (held_out.temperature, held_out.stop_class) == (1.0, (1, 4))
    greedy = config(folder, "evaluation.temperature=0")
    assert held_out_sampling(several.pairs.apply(greedy)).stop_class == ()  # as it will be used


def test_ids_that_end_the_turns_of_a_teacher_alone_count_for_it_and_are_not_excluded(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<end>"]})
    tokenizer.save_pretrained(folder / "teacher")
    change(folder / "teacher" / "generation_config.json", eos_token_id=[1, 113])
    resolved = load_inputs(config(folder)).pairs.apply(config(folder))
    assert resolved.rollout.stop_class == (1,)
    assert resolved.teachers["main"].stop_class == (1, 113)
    assert resolved.teachers["main"].excluded_token_ids == (112,)
    without = config(folder, "teachers.main.excluded_token_ids=[113]")
    assert load_inputs(without).pairs.apply(without).teachers["main"].excluded_token_ids == (112, 113)
    off = config(folder, "rollout.stop_class=[]")
    assert load_inputs(off).pairs.apply(off).teachers["main"].excluded_token_ids == (112, 113)
    assert load_inputs(resolved).pairs.apply(resolved) == resolved


def test_speculative_decoding_is_refused_where_stop_ids_are_merged(folder: Path) -> None:
    speculates = 'rollout.engine.extra={speculative_config={method="ngram",num_speculative_tokens=2}}'
    load_inputs(config(folder, speculates))  # there is one stop id
    change(folder / "student" / "generation_config.json", eos_token_id=[1, 4])
    with pytest.raises(ConfigError, match=r"one token of the ids \[1, 4\] .* or set rollout.stop_class = \[\]"):
        load_inputs(config(folder, speculates))
    load_inputs(config(folder, speculates, "rollout.stop_class=[]"))


def test_the_stop_ids_of_a_teacher_with_tokens_of_its_own_are_one_by_its_roles() -> None:
    assert by_role(INSTRUCT) == (4, 3)
    assert by_role(BASE) == (3,)
