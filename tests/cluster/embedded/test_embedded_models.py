"""The models and prompts in `cluster/embedded` are what the demo takes them for."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDED = Path(__file__).parents[3] / "cluster" / "embedded"
MODELS = ["teacher", "student"]
MEGABYTE = 1_000_000


def read_prompts(name: str) -> list[dict[str, str]]:
    """Read one prompt file."""
    with (EMBEDDED / f"{name}.jsonl").open() as file:
        return [json.loads(line) for line in file]


def parse(prompt: str) -> tuple[int, tuple[int, ...]]:
    """Return the target and the list of a prompt such as `28 : 21 14 4 22 19 6 |`."""
    target, numbers = prompt.removesuffix(" |").split(" : ")
    return int(target), tuple(map(int, numbers.split()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_predicts_every_word_of_its_tokenizer_and_stops_at_its_end_token(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / name)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / name)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    assert len(tokenizer) % 16 == 0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_gains_the_begin_token_and_survives_the_round_trip(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / name)
    text = "28 : 21 14 4 22 19 6 |"
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == 1 + 9
    assert token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_teacher_and_student_share_one_tokenizer(file: str) -> None:
    assert (EMBEDDED / "teacher" / file).read_bytes() == (EMBEDDED / "student" / file).read_bytes()


def test_the_teacher_solves_an_easy_list_greedily() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher", dtype=torch.float32)
    row = read_prompts("held_out")[0]
    prompt = tokenizer(row["prompt"], return_tensors="pt")
    output = teacher.generate(**prompt, do_sample=False, max_new_tokens=48)
    completion = output[0, prompt["input_ids"].shape[1] :]
    assert completion[-1] == tokenizer.eos_token_id
    assert re.fullmatch(row["answer"], tokenizer.decode(completion, skip_special_tokens=True).strip())


def test_no_held_out_problem_is_a_reordered_training_problem() -> None:
    problems = {name: [parse(row["prompt"]) for row in read_prompts(name)] for name in ("train", "held_out")}
    train, held_out = ({(target, frozenset(numbers)) for target, numbers in rows} for rows in problems.values())
    assert len(train) == 20_000
    assert len(held_out) == 1_000
    assert not train & held_out


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_the_answer_accepts_the_only_pair_that_sums_to_the_target(name: str) -> None:
    for row in read_prompts(name):
        target, numbers = parse(row["prompt"])
        solutions = [pair for pair in itertools.combinations(numbers, 2) if sum(pair) == target]
        assert len(solutions) == 1
        [(first, second)] = solutions
        assert re.fullmatch(row["answer"], f"{first} + {second} = {target}")
        assert re.fullmatch(row["answer"], f"1 + 1 = 2 x {second} + {first} = {target}")


@pytest.mark.parametrize(
    "completion",
    [
        "22 + 6 = 29",  # a false sum
        "21 + 6 = 28",  # a false pair
        "22 + 6 = 28 x",  # doubted after all
        "22 + 6 = 28 x 21 + 6 = 27",  # the last try is wrong
        "21 + 6 = 27 22 + 6 = 28",  # a miss without its mark
        "22 + 6 = 28 22",
    ],
)
def test_the_answer_refuses(completion: str) -> None:
    answers = [row["answer"] for row in read_prompts("train") if re.fullmatch(row["answer"], "22 + 6 = 28")]
    assert answers
    assert not any(re.fullmatch(answer, completion) for answer in answers)


def test_everything_embedded_fits_in_seven_megabytes() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 7 * MEGABYTE
