"""The prompts of a run are those that it began with, also when it is resumed."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import parse_run_config
from cluster.contracts.errors import CheckpointError, PromptError
from cluster.contracts.requests import RolloutRequest
from cluster.run.inputs import Inputs, load_inputs, train_requests
from cluster.run.ledger import LedgerRecord, verify_run
from cluster.run.prompt_record import compare_prompts, read_record, write_record
from tests.malformed.refusal import assert_refused

EMBEDDED = Path(__file__).parents[3] / "cluster" / "embedded"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Return the embedded student with a chat template that writes the time of day."""
    folder = tmp_path / "student"
    folder.mkdir()
    for file in (EMBEDDED / "student").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for m in messages %}{{ strftime_now('%S %M %H') }} : {{ m['content'] }} |{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def config_of(folder: Path, student: Path, *overrides: str) -> Config:
    text = f"""
        run.directory = "{folder}"
        student.model = "{student}"
        teachers.main.model = "{EMBEDDED}/teacher"
        rollout.max_completion_tokens = 8
        prompts.train = "{folder}/train.jsonl"
        prompts.prompts_per_step = 2
    """
    return parse_run_config(text, [*overrides])


def write_prompts(folder: Path, *prompts: str) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def begin(config: Config) -> tuple[RunDirectory, Inputs]:
    directory = RunDirectory.create(config)
    inputs = load_inputs(config, now=datetime(2026, 1, 2, 3, 4, 5))
    write_record(directory, inputs)
    return directory, inputs


def test_a_resumed_run_renders_the_prompts_of_its_beginning(tmp_path: Path, student: Path) -> None:
    write_prompts(tmp_path, "1 2", "3 4")
    config = config_of(tmp_path, student)
    directory, inputs = begin(config)
    record = read_record(directory)
    assert record is not None
    later, other_time = load_inputs(config, now=record.began_at), load_inputs(config)
    assert later.prompts.prompt(0).token_ids.tolist() == inputs.prompts.prompt(0).token_ids.tolist()
    assert compare_prompts(directory, record, later) == []
    assert len(compare_prompts(directory, record, other_time)) == 1  # the template reads the time


def test_other_prompts_are_a_warning_and_another_number_of_them_a_refusal(tmp_path: Path, student: Path) -> None:
    write_prompts(tmp_path, "1 2", "3 4")
    config = config_of(tmp_path, student)
    directory, _ = begin(config)
    record = read_record(directory)
    assert record is not None
    write_prompts(tmp_path, "1 2", "3 5")
    [warning] = compare_prompts(directory, record, load_inputs(config, now=record.began_at))
    assert warning.startswith("warning: the prompts are not those that the run began with")
    write_prompts(tmp_path, "1 2", "3 4", "5 6")
    more = load_inputs(config, now=record.began_at)
    says = "the run began with 2 training prompts and would go on with 3"
    assert_refused(lambda: compare_prompts(directory, record, more), PromptError, says)


def test_a_ledger_is_verified_from_the_record_without_prompts_or_models(tmp_path: Path, student: Path) -> None:
    write_prompts(tmp_path, "1 2", "3 4", "5 6")
    config = config_of(tmp_path, student)
    directory, inputs = begin(config)
    requests: list[list[RolloutRequest]] = [train_requests(config, inputs, step) for step in range(3)]
    records = [LedgerRecord.of(step, of, (step - 1, step - 1)) for step, of in enumerate(requests, start=1)]
    directory.ledger.write_bytes(b"".join(json_line(record) for record in records))
    (tmp_path / "train.jsonl").unlink()
    (student / "config.json").unlink()
    began = time.process_time()
    assert verify_run(directory).startswith("3 steps, 6 trajectories")
    assert time.process_time() - began < 1
    directory.prompts.write_text("{}")
    assert_refused(lambda: verify_run(directory), CheckpointError, "prompts.json: no record of a run's prompts")


def json_line(record: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(record) + b"\n"
