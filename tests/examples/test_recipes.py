"""The recipes for GPUs resolve, find their places, fit into the memory of the GPUs that they name, and render prompts.

No weight is there: the models are configurations and tokenizers in a cache of the hub, rebuilt by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.qwen3_hub import write_hub

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "examples/recipes"
# Recipe, GPUs, GiB that a card of its kind offers.
MACHINES = {
    "gsm8k_1gpu": (1, 79),
    "gsm8k_2gpus": (2, 47.5),
    "gsm8k_8gpus": (8, 79),
    "one_hour": (1, 23.5),
    "several_teachers": (8, 79),
}
# Two rows of openai/gsm8k, as its files have them.
ROWS = (
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips "
        "altogether in April and May.\n#### 72",
    },
    {
        "question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How "
        "much did she earn?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 = "
        "$<<0.2*50=10>>10.\n#### 10",
    },
)
PARTS = ("train", "held_out")
CONVERSATION = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}],
    "source": "x",
}
PROGRAM = """
import json, sys
from contextlib import redirect_stdout, redirect_stderr
from io import StringIO
from cluster.cli import main

for name, arguments in json.loads(sys.argv[1]).items():
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([name, code, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Plan every recipe in one process that knows the hub from its cache alone; return exit codes, output, errors."""
    folder = tmp_path_factory.mktemp("recipes")
    gsm8k = folder / "gsm8k.jsonl"
    gsm8k.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    mixed = folder / "mixed.jsonl"
    mix = [sys.executable, "-m", "examples.recipes.mix_prompts", f"math={gsm8k}", f"general={gsm8k}"]
    subprocess.run([*mix, "--output", str(mixed)], check=True, cwd=ROOT)
    commands = {}
    for name, (gpus, gib) in MACHINES.items():
        prompts = [f"prompts.train={mixed}"] if "several" in name else [f"prompts.{part}={gsm8k}" for part in PARTS]
        machine = ["--gpus", str(gpus), "--gpu-memory", str(gib)]
        commands[name] = ["plan", str(RECIPES / f"{name}.toml"), *prompts, *machine]
    for gpus in (1, 8):
        pair = ["--student", "Qwen/Qwen3-1.7B-Base", "--teacher", "Qwen/Qwen3-8B", "--data", str(gsm8k)]
        machine = ["--gpus", str(gpus), "--gpu-memory", "79", "--out", str(folder / f"init{gpus}.toml")]
        commands[f"init on {gpus}"] = ["init", *pair, *machine]
        commands[f"init on {gpus}, planned"] = ["plan", str(folder / f"init{gpus}.toml"), *machine[:4]]
    (folder / "ours").mkdir()
    for split in ("train", "test"):  # a data set as `datasets` reads it from a folder
        (folder / f"ours/{split}.jsonl").write_text(json.dumps(CONVERSATION) + "\n")
    small = ["--student", "Qwen/Qwen3-0.6B", "--teacher", "Qwen/Qwen3-1.7B", "--data", str(folder / "ours")]
    commands["init on a folder"] = [
        "init",
        *small,
        "--gpus",
        "1",
        "--gpu-memory",
        "23.5",
        "--out",
        str(folder / "r.toml"),
    ]
    write_hub(folder / "hub")
    environment = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(program, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (code, out, err) for name, code, out, err in lines}


def test_every_recipe_has_a_test() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(MACHINES)


@pytest.mark.parametrize("recipe", MACHINES)
def test_a_recipe_fits_the_gpus_that_it_names(recipe: str, outcomes: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = outcomes[recipe]
    assert (code, err) == (0, ""), err
    assert "<|im_start|>user\\nNatalia sold clips" in out
    assert "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'" in out  # thinking is off
    assert "its answer: '72'" in out


@pytest.mark.parametrize("gpus", [1, 8])
def test_init_lets_a_base_student_and_an_instruct_teacher_in(
    gpus: int, outcomes: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = outcomes[f"init on {gpus}"]
    assert (code, err) == (0, ""), err
    for choice in (
        'accept_differences = ["eos"]',
        'prompts.columns = { prompt = "question" }',
        'prompts.answer_after = "####"',
        "prompts.chat_template_kwargs = { enable_thinking = false }",
        'environment.verifier = "math"',
        "learner.learning_rate = 5e-06",
    ):
        assert choice in out
    code, out, err = outcomes[f"init on {gpus}, planned"]
    assert (code, err) == (0, ""), err


def test_init_finds_conversations_and_the_held_out_split(outcomes: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = outcomes["init on a folder"]
    assert code == 0
    assert "prompts.columns" not in out  # a run reads `messages` where there is no `prompt`
    assert 'prompts.last_answer = "drop": of conversations that end with the assistant\'s message' in out
    assert 'ours:test": found beside the training prompts' in out
    assert "teachers.main.accept_differences" not in out  # both end their turns at the same token
