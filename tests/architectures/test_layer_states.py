"""Of every layer, vLLM sends what transformers calls `hidden_states`; an engine per model, no Ray."""

import json
import os
import subprocess
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.architectures.layer_states import DEPTH, RANK
from tests.interpreter import python

PROGRAM = "import sys; from tests.architectures.layer_states import main; sys.exit(main())"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("preloaded")]
TOLERANCE = 1e-4  # of a state's length, in float32; another layer, or another row, is about as far off as it is long


def tried(*names: str) -> list[dict[str, Any]]:
    command = [python(), "-c", PROGRAM, *names]
    with TemporaryDirectory() as own:  # at its end, vLLM leaves the file by which the ranks of an engine meet
        environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "TMPDIR": own}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(answer: dict[str, Any]) -> None:
    assert len(answer["layers"]) == DEPTH
    assert max(answer["layers"]) < TOLERANCE, answer
    assert max(answer["last"], answer["projected"]) < TOLERANCE, answer
    assert min(answer["last without norm"], answer["shifted"]) > 0.1, answer
    assert answer["widths"] == [64, DEPTH * RANK]


def test_every_layer_of_a_llama_is_transformers_own() -> None:
    (answer,) = tried("llama")
    check(answer)


@pytest.mark.exhaustive
def test_every_layer_of_other_families_is_transformers_own() -> None:
    # Residual sums, none, attention beside the MLP, and what runs by transformers' classes.
    for answer in tried("qwen3", "gpt2", "granite", "cohere2", "olmo2"):
        check(answer)
