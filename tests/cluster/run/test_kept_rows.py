"""What the driver makes of the rows that the learner's ranks have kept."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ActorDiedError
from cluster.contracts.kept_rows import KeptRowFiles, Taken
from cluster.demo import EMBEDDED
from cluster.run.kept_rows import KeptRows, TokenTexts, join
from tests.builders import make_config
from tests.cluster.run.contexts import make_run_context


@pytest.fixture(scope="module")
def texts():
    """Return the texts of a tokenizer with one token per byte, and ` the`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: index for index, one in enumerate(alphabet)}
    for merged in ("Ġt", "Ġth", "Ġthe"):
        vocabulary[merged] = len(vocabulary)
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return TokenTexts(fast), lambda text: fast.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a the", ["a", " the"]),
        (" the", [" the"]),
        ("é!", ["é", "", "!"]),
        ("x\N{GRINNING FACE}y", ["x", "\N{GRINNING FACE}", "", "", "", "y"]),
        ("\N{HEBREW LETTER ALEF}", ["\N{HEBREW LETTER ALEF}", ""]),
        ("\0<", ["\0", "<"]),
    ],
)
def test_texts_of_tokens_join_to_the_text(texts, text, expected):
    of, encode = texts
    assert of.of_sequence(encode(text)) == expected


def test_half_a_character_is_shown_as_broken(texts):
    of, encode = texts
    assert of.of_sequence(encode("\N{GRINNING FACE}")[:3]) == ["\N{REPLACEMENT CHARACTER}"] * 3


def test_the_vocabulary_has_every_candidate_and_no_other_token(texts):
    of, encode = texts
    the, a = encode(" the")[0], encode("a")[0]
    candidates = pa.array([[[the, a]]], pa.list_(pa.list_(pa.int32())))
    table = of.add_to(
        pa.table({"token_ids": pa.array([[a, the]], pa.list_(pa.int32())), "candidate_ids": candidates}), step=3
    )
    assert dict(table["vocabulary"][0].as_py()) == {the: " the", a: "a"}
    assert table["token_texts"].to_pylist() == [["a", " the"]]
    assert table["step"].to_pylist() == [3]


def taken(chosen=None, worst=None):
    return Taken(chosen, worst, seconds=0.0)


def in_ipc(trajectory_id, log_ratio):
    batch = pa.record_batch({"trajectory_id": [trajectory_id], "log_ratio": pa.array([log_ratio], pa.float32())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_of_each_ranks_worst_row_the_worst_stays_unless_it_is_chosen():
    rows = join([taken(in_ipc(4, 0.1), in_ipc(5, 1.0)), taken(in_ipc(2, 0.2), in_ipc(6, 2.0)), taken()])
    assert rows.select(["trajectory_id", "reason"]).to_pylist() == [
        {"trajectory_id": 2, "reason": "chosen"},
        {"trajectory_id": 4, "reason": "chosen"},
        {"trajectory_id": 6, "reason": "worst"},
    ]
    assert join([taken(in_ipc(5, 1.0), in_ipc(5, 1.0))])["reason"].to_pylist() == ["chosen"]


def test_a_step_without_rows_has_no_table():
    assert join([taken()]) is None


def test_a_prompt_that_the_teacher_read_alone_has_texts_too(texts):
    of, encode = texts
    rows = pa.table({"token_ids": [[1]], "teacher_prompt_ids": pa.array([encode("é the")], pa.list_(pa.int32()))})
    assert of.add_to(rows, step=1)["teacher_prompt_texts"].to_pylist() == [["é", "", " the"]]


def test_a_tokenizer_that_puts_spaces_between_words_shows_them():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "12": 2, "+": 3}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<bos>"])
    of = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>"))
    assert of.of_sequence([2, 3, 2]) == [" 12", " +", " 12"]


class Ranks:
    """Stands for the learner and for Ray: answers are values, or errors that are raised."""

    def __init__(self, *answers):
        self._answers = list(answers)

    def take_kept_rows(self):
        return [self._answers.pop(0)]

    def get(self, references, timeout_seconds, waiting_for):
        if isinstance(references[0], Exception):
            raise references[0]
        return references


@pytest.fixture
def run_with(tmp_path):
    """Return a function that makes the hook of a run whose ranks answer as given, and the run's directory."""
    every = "logging.kept_every_steps=1"
    config = make_config(f"run.directory={tmp_path}", f"student.model={EMBEDDED / 'student'}", every)
    directory = RunDirectory.create(config)

    def make(*answers, first_step=0):
        ranks = Ranks(*answers)
        run = make_run_context(config, None, SimpleNamespace(learner=ranks), directory, first_step)
        return KeptRows(run, ranks), KeptRowFiles(directory.kept_rows)

    return make


def kept_row(trajectory_id):
    batch = pa.record_batch({"trajectory_id": [trajectory_id], "token_ids": pa.array([[36, 16]], pa.list_(pa.int32()))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return taken(sink.getvalue().to_pybytes())


def test_rows_are_written_beside_the_loop_and_a_step_whose_ranks_died_is_left_out(run_with):
    hook, files = run_with(kept_row(7), ActorDiedError("learner-0 died"), kept_row(9))
    for step in (1, 2, 3):
        assert hook.after_step(step, {}, [])["kept_rows/write_seconds"] >= 0
    hook.end(None)
    assert [(step, rows["trajectory_id"].to_pylist()) for step, rows in files.read()] == [(1, [7]), (3, [9])]
    assert next(files.read())[1]["token_texts"].to_pylist() == [[" 32", " 12"]]


def test_a_resumed_run_keeps_the_rows_of_its_first_steps_alone(run_with):
    hook, _ = run_with(kept_row(7), kept_row(8))
    for step in (1, 2):
        hook.after_step(step, {}, [])
    hook.end(None)
    hook, files = run_with(first_step=1)
    hook.end(None)
    assert [step for step, _ in files.read()] == [1]
