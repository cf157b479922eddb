from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.contracts.errors import ModelError
from cluster.models.alignment import ABSENT, Alignment, TokenMap, strict_pairs
from cluster.models.token_bytes import TokenBytes
from tests.made_tokenizers import SPECIAL, TEXT, byte_level, permuted, sentencepiece, wrap

NASTY = [
    "the quick brown fox",
    " 12 + 30 = 42",
    "12",
    "\U0001f600\U0001f469\u200d\U0001f4bb",  # emoji, one of several code points
    "e\u0301 \u0939\u093f\u0928\u094d\u0926\u0940",  # combining marks
    "a\r\n\r\n  b\t\n",
    "   leading",
    "\x00 NUL \x00",
    "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",  # right to left
    "</s> <eos> <think>",
    "\ufeffbom \ufffd",
    " ",
    "\n",
]
MADE = {
    "byte-level": byte_level(40),
    "byte-level, few merges": byte_level(5, splits=False),
    "sentencepiece": sentencepiece(40),
    "sentencepiece without prefix": sentencepiece(10, prefix=False),
}
BYTES = {name: TokenBytes(tokenizer, name) for name, tokenizer in MADE.items()}
PAIRS = [(one, other) for one in MADE for other in MADE]


def aligned(token_map: TokenMap, token_ids: list[int]) -> Alignment:
    alignment = token_map.align(np.array(token_ids, np.int32))
    assert alignment is not None
    return alignment


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("text", NASTY)
def test_what_is_written_reads_as_the_same_bytes(name: str, text: str) -> None:
    token_ids = BYTES[name].write(text.encode())
    assert token_ids is not None
    assert b"".join(BYTES[name].read(token_ids) or []) == text.encode()


@given(text=st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_written_and_read(text: bytes) -> None:
    for tokens in BYTES.values():
        token_ids = tokens.write(text)
        assert token_ids is not None
        assert b"".join(tokens.read(token_ids) or []) == text


@given(text=st.text(max_size=30), data=st.data())
@settings(max_examples=80, deadline=None)
def test_strict_positions_have_equal_spans_and_spans_partition_the_bytes(text: str, data: st.DataObject) -> None:
    one, other = (BYTES[name] for name in data.draw(st.sampled_from(PAIRS)))
    written = one.write(text.encode()) or []
    cut = data.draw(st.integers(0, len(written)))  # a completion may end within a character
    alignment = aligned(TokenMap(one, other), written[:cut])
    ours, theirs = one.read(written[:cut]), other.read(alignment.token_ids.tolist())
    assert ours is not None
    assert theirs is not None
    assert b"".join(ours) == b"".join(theirs)
    starts = np.cumsum([0, *map(len, ours)]), np.cumsum([0, *map(len, theirs)])
    spans = [{(int(a), int(b)): i for i, (a, b) in enumerate(pairwise(s)) if a < b} for s in starts]
    expected = sorted((spans[0][span], spans[1][span]) for span in spans[0].keys() & spans[1].keys())
    found = zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True)
    assert sorted(found) == expected


@pytest.mark.parametrize("name", MADE)
def test_a_tokenizer_with_itself_is_strict_everywhere_and_maps_every_token_to_itself(name: str) -> None:
    tokens = BYTES[name]
    token_map = TokenMap(tokens, tokens)
    text = "".join(NASTY).encode()
    written = tokens.write(text) or []
    alignment = aligned(token_map, [*written, tokens.roles["eos"]])
    assert alignment.token_ids.tolist() == [*written, tokens.roles["eos"]]
    assert alignment.student_positions.tolist() == list(range(len(written) + 1))
    shared = token_map.ids[token_map.ids != ABSENT]
    assert len(set(shared.tolist())) == len(shared)
    assert (token_map.ids[written] == written).all()


def test_a_permuted_vocabulary_is_the_same_text_in_other_ids() -> None:
    order = np.random.default_rng(0).permutation(len(MADE["byte-level"]))
    one, other = BYTES["byte-level"], TokenBytes(permuted(MADE["byte-level"], order), "permuted")
    written = np.array(one.write("".join(NASTY).encode()), np.int32)
    token_map = TokenMap(one, other)
    assert (aligned(token_map, written.tolist()).token_ids == order[written]).all()
    assert (token_map.ids == order).all()


def test_pairs_are_the_tokens_that_cover_the_same_bytes() -> None:
    assert strict_pairs([b" 12", b" +", b" 3", b"0"], [b" ", b"12", b" +", b" 30"]) == [(1, 2)]
    assert strict_pairs([b"a", b"b"], [b"ab"]) == []
    assert strict_pairs([b"\xc3", b"\xa9", b"x"], [b"\xc3\xa9", b"x"]) == [(2, 1)]  # a character in two parts
    assert strict_pairs([], []) == []


def test_a_leading_space_belongs_to_the_first_token() -> None:
    one, other = BYTES["byte-level"], BYTES["sentencepiece"]
    with_space, without = (aligned(TokenMap(one, other), one.write(text) or []) for text in (b" the", b"the"))
    assert b"".join(other.read(with_space.token_ids.tolist()) or []) == b" the"
    assert b"".join(other.read(without.token_ids.tolist()) or []) == b"the"


def test_a_completion_that_ends_within_a_character_keeps_its_bytes() -> None:
    one, other = BYTES["byte-level"], BYTES["sentencepiece"]
    cut = one.write(b"dog \xf0\x9f\x98") or []
    alignment = aligned(TokenMap(one, other), cut)
    assert b"".join(other.read(alignment.token_ids.tolist()) or []) == b"dog \xf0\x9f\x98"


def test_special_tokens_go_by_role_and_stops_by_class() -> None:
    renamed = ("<eos>", "<turn>", "<pad>", "<unk>")
    student = TokenBytes(byte_level(10, special=(*SPECIAL, "<turn>", "<other>")), "student")
    teacher = TokenBytes(sentencepiece(10, special=renamed), "teacher")
    token_map = TokenMap(student, teacher, stop_ids=[5])  # <other> ends the student's turns too
    assert token_map.ids[:6].tolist() == [2, ABSENT, 0, 3, 1, ABSENT]  # one EOS; <turn> by its name
    alignment = aligned(token_map, [*(student.write(b"x") or []), 5])
    assert alignment.token_ids[-1] == 0  # the teacher's EOS
    assert alignment.student_positions[-1] == 1


def test_positions_go_on_behind_a_special_token() -> None:
    one, other = BYTES["byte-level"], BYTES["sentencepiece"]
    ours = [*(one.write(b" the fox") or []), one.roles["eos"], *(one.write(b" lazy dog") or [])]
    alignment = aligned(TokenMap(one, other), ours)
    texts, theirs = one.read(ours), other.read(alignment.token_ids[alignment.teacher_positions].tolist())
    assert texts is not None
    assert theirs is not None
    assert [texts[place] for place in alignment.student_positions] == theirs
    assert theirs.index(b"<eos>") not in (0, len(theirs) - 1)


def test_a_special_token_without_a_partner_is_its_text() -> None:
    student = TokenBytes(byte_level(10, special=(*SPECIAL, "<tool>")), "student")
    alignment = aligned(TokenMap(student, BYTES["sentencepiece"]), [4])
    assert b"".join(BYTES["sentencepiece"].read(alignment.token_ids.tolist()) or []) == b"<tool>"
    assert alignment.student_positions.tolist() == []


@pytest.mark.parametrize("is_special", [False, True])
def test_a_think_tag_is_the_teachers_token_where_the_student_spells_it(is_special: bool) -> None:
    made = byte_level(10)
    made.add_tokens([AddedToken("<think>", special=is_special, normalized=False)], special_tokens=is_special)
    teacher = TokenBytes(made, "teacher")
    student = BYTES["byte-level, few merges"]
    alignment = aligned(TokenMap(student, teacher), student.write(b"a<think>b") or [])
    assert alignment.token_ids.tolist() == [*(teacher.write(b"a") or []), len(made) - 1, *(teacher.write(b"b") or [])]
    back = aligned(TokenMap(teacher, student), [len(made) - 1])
    assert b"".join(student.read(back.token_ids.tolist()) or []) == b"<think>"
    assert back.student_positions.tolist() == []
    assert TokenMap(teacher, teacher).ids[len(made) - 1] == len(made) - 1


def test_text_that_looks_like_a_special_token_is_text() -> None:
    one, other = BYTES["byte-level"], BYTES["sentencepiece"]
    alignment = aligned(TokenMap(one, other), one.write(b"<eos>") or [])
    assert other.roles["eos"] not in alignment.token_ids


def test_a_tokenizer_that_normalises_what_was_written_gives_no_alignment() -> None:
    normalising = byte_level(10)
    normalising.backend_tokenizer.normalizer = normalizers.NFC()
    teacher = TokenBytes(normalising, "teacher")
    token_map = TokenMap(BYTES["byte-level"], teacher)
    decomposed, plain = (BYTES["byte-level"].write(text.encode()) for text in ("e\u0301", "plain"))
    assert token_map.align(np.array(decomposed, np.int32)) is None
    assert token_map.align(np.array(plain, np.int32)) is not None


def test_ids_that_are_no_tokens_are_absent() -> None:
    token_map = TokenMap(BYTES["byte-level"], BYTES["sentencepiece"])
    assert token_map.align(np.array([10_000], np.int32)) is None
    assert token_map.to_teacher(np.array([[10_000, 2]], np.int32)).tolist() == [[ABSENT, 2]]


def test_the_digest_changes_with_the_map() -> None:
    same, other = (TokenMap(BYTES["byte-level"], BYTES[name]).digest for name in ("byte-level", "sentencepiece"))
    assert same == TokenMap(BYTES["byte-level"], BYTES["byte-level"]).digest
    assert same != other


def test_a_tokenizer_of_whole_words_is_refused_by_name() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ModelError, match=r"model 'm': the bytes of its tokens are not known.*WordLevel"):
        TokenBytes(wrap(words, ()), "m")


def test_the_texts_are_trained_on() -> None:
    """The made tokenizers differ, or the other tests would say little."""
    lengths = {name: len(tokens.write(TEXT[0].encode()) or []) for name, tokens in BYTES.items()}
    assert len(set(lengths.values())) > 1
    assert isinstance(MADE["sentencepiece"], PreTrainedTokenizerFast)
