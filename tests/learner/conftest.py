"""A tiny student and seven trajectories for the learner's tests."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from tests.learner.support import OBJECTIVES, VOCABULARY, make_scored

ConfigMaker = Callable[..., Config]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch from spinning on cores that the actors need."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random Qwen3 with tied embeddings, and its tokenizer."""
    folder = write_model(tmp_path_factory.mktemp("student"), width=64)
    vocabulary = {f"<{index}>": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>", pad_token="<0>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random Qwen3 that is wider than the student."""
    return write_model(tmp_path_factory.mktemp("wide"), width=96)


def write_model(folder: Path, width: int) -> Path:
    torch.manual_seed(width)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_config(student_folder: Path) -> ConfigMaker:
    """Return a function that builds a run of the tiny student from dotted overrides."""

    def make(*overrides: str) -> Config:
        text = f"""
            [student]
            model = "{student_folder}"
            [prompts]
            train = "unused.jsonl"
            [rollout.engine]
            dtype = "float32"
            [teachers.only]
            model = "{student_folder}"
            [learner]
            dtype = "float32"
            learning_rate = 1e-3
            micro_batch_tokens = 64
            [ray]
            call_timeout_seconds = 120
            start_timeout_seconds = 200
        """
        return parse_run_config(text, overrides)

    return make


@pytest.fixture(scope="session")
def scored() -> pa.RecordBatch:
    """Return seven trajectories of unequal length, each token with a random teacher's most likely ones."""
    return make_scored(OBJECTIVES["topk"])
