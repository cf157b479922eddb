"""The run files of examples/self_distillation resolve on the embedded pair; their contexts say what they promise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config.methods import METHODS
from cluster.config.run_file import load_run_config
from cluster.demo import EMBEDDED
from cluster.models.model_files import load_tokenizer
from cluster.run.inputs import load_inputs
from rollout_workers.contexts.builder import ContextBuilder
from rollout_workers.contexts.groups import Attempt
from tests.builders import make_trajectory

FOLDER = Path(__file__).parents[2] / "examples/self_distillation"
ROWS = [json.loads(line) for line in (EMBEDDED / "train.jsonl").read_text().splitlines()[:8]]
RIGHT = "1 + 2 = 3 x 4 + 8 = 12"  # of the first prompt
PAIR = "<bos> 12 : 4 8 4 8 4 8 |"


def test_every_method_has_an_example() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_the_student_and_reads_the_pair_of_the_solution(method: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    student = str(EMBEDDED / "student")
    paths = [f"student.model={student}", f"prompts.train={prompts}", f"prompts.held_out={prompts}"]
    config = load_run_config(FOLDER / f"{method}.toml", paths)
    teacher = config.teachers["self"]
    assert (config.method, teacher.source, teacher.model) == (method, "student", student)
    inputs = load_inputs(config)
    assert inputs.contexts is not None
    tokenizer = load_tokenizer(student)
    builder = ContextBuilder(inputs.contexts, tokenizer, inputs.prompts)

    def read(*texts_and_rewards: tuple[str, float]) -> str:
        group = [
            Attempt(make_trajectory(teacher="self", trajectory_id=index, sample_index=index, reward=reward), text)
            for index, (text, reward) in enumerate(texts_and_rewards)
        ]
        row, _ = builder.add(group[0], group, "all")
        ids: Any = row.scorer_prompts["teacher"]
        return str(tokenizer.decode(np.asarray(ids)))

    assert read(("4 + 9 = 13", 0.0), (RIGHT, 1.0)) == PAIR
    assert read(("4 + 9 = 13", 0.0), ("4 + 9 = 13", 0.0)) == ("" if method == "sdpo" else PAIR)
