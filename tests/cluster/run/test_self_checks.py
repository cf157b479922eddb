import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cluster.contracts.errors import ModelError
from cluster.contracts.trajectory import add_scores, make_generated
from cluster.models.model_checks import check_tokenizers
from cluster.run.preflight import check_not_uniform, check_replicas, check_sampler_gap, check_self_kl
from tests.builders import make_trajectory


def make_tokenizer(words: str, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words.split())}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


def make_scored(*logprobs: float) -> pa.RecordBatch:
    batch = make_generated([make_trajectory(completion=range(len(logprobs)))])
    return add_scores(batch, "teacher", {"logprobs": np.array(logprobs, dtype=np.float32)})


def test_the_same_tokenizer_passes() -> None:
    check_tokenizers(make_tokenizer("<unk> a b"), {"t": make_tokenizer("<unk> a b")}, compare_templates=True)


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        (make_tokenizer("<unk> b a"), "token 'a' has id 1 for the student and 2 for the teacher"),
        (make_tokenizer("<unk> a"), "token 'b' has id 2 for the student and None for the teacher"),
        (make_tokenizer("<unk> a b c"), "token 'c' exists for the teacher only"),
        (make_tokenizer("<unk> a b", eos_token="b"), "eos_token is None for the student and 'b' for the teacher"),
        (make_tokenizer("<unk> a b", chat_template="x"), "their chat templates differ"),
    ],
)
def test_a_tokenizer_that_differs_is_named_with_its_first_difference(
    teacher: PreTrainedTokenizerFast, sentence: str
) -> None:
    with pytest.raises(ModelError, match=f"teachers.math: .*{sentence}"):
        check_tokenizers(make_tokenizer("<unk> a b"), {"math": teacher}, compare_templates=True)


def test_raw_prompts_need_no_common_chat_template() -> None:
    teacher = make_tokenizer("<unk> a b", chat_template="x")
    check_tokenizers(make_tokenizer("<unk> a b"), {"t": teacher}, compare_templates=False)


def test_replicas_that_disagree_fail() -> None:
    assert check_replicas("t", [make_scored(-1, -2), make_scored(-1, -2)], "float32").passed
    assert not check_replicas("t", [make_scored(-1, -2), make_scored(-1, -2.01)], "float32").passed


def test_uniform_scores_fail() -> None:
    assert not check_not_uniform("t", make_scored(-4.7, -4.7, -4.7)).passed
    assert check_not_uniform("t", make_scored(-4.7, -0.1, -2.0)).passed


def test_a_learner_that_computes_other_logprobs_fails() -> None:
    written = make_generated([make_trajectory()])
    half = np.full(3, np.log(0.5), dtype=np.float32)
    assert check_sampler_gap(written, half, "float32").passed
    assert not check_sampler_gap(written, half + 0.01, "float32").passed


def test_a_shift_by_one_token_fails_the_self_kl() -> None:
    half = float(np.log(0.5))
    assert check_self_kl(make_scored(half, half, half), "float32").passed
    assert not check_self_kl(make_scored(-5.0, half, half), "float32").passed
