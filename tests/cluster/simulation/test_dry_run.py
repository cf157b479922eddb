"""`preceptor plan` without rates places a run and estimates its memory on GPUs that are not there."""

from pathlib import Path

import pytest

from cluster.cli import main
from cluster.demo import EMBEDDED

RUN_FILE = f"""
student.model = "{EMBEDDED / "student"}"
teachers.main.model = "{EMBEDDED / "teacher"}"
prompts.template = "raw"
rollout.max_completion_tokens = 48
rollout.num_workers = 4
learner.num_workers = 3
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "12 : 27 25 9 23 4 8 |", "answer": "42"}\n')
    (tmp_path / "run.toml").write_text(f'{RUN_FILE}prompts.train = "{prompts}"\n')
    return tmp_path / "run.toml"


def test_a_run_is_placed_on_described_gpus_without_reading_a_weight(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(run_file), "--gpus", "8", "--gpu-memory", "80"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("machine: 8 GPUs of 80 GiB")
    assert "student: qwen3, 343k parameters" in said
    assert "prompts: 1 for training, 0 held out; 10 tokens (median), 10 (longest); every engine has room for 59" in said
    [rollout] = [line.split() for line in said if line.startswith("rollout ")]
    assert rollout[-2] == "80.0"
    assert float(rollout[-3]) == pytest.approx(72.8, abs=0.2)  # 0.9 are the engine's; NCCL and a bucket beside it
    assert "learner: micro-batches of 16,384 tokens without gradient checkpointing" in "\n".join(said)
    assert {"rollout: 4 x 1 GPU", "learner: 3 x 1 GPU"} <= set(said)
    assert "its answer: '42'" in said


def test_gpus_that_are_too_few_or_too_small_are_one_sentence(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(run_file), "--gpus", "7", "--gpu-memory", "80"]) == 1
    assert "the run needs 8 GPUs and the cluster has 7" in capsys.readouterr().err
    assert main(["plan", str(run_file), "--gpus", "8", "--gpu-memory", "2"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(
        "preceptor: rollout: 2.8 GiB (buffers 0.3, context 2.5) leave 0.00 of a GPU's 2.0 GiB to "
    )
    assert "left" in said.out  # the table, above the refusal


def test_a_shared_gpu_is_the_only_one_of_its_node(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_each = ("rollout.num_workers=1", "learner.num_workers=1", "ray.share_gpu=true")
    assert main(["plan", str(run_file), *one_each, "--gpus", "1", "--gpu-memory", "24"]) == 0
    said = capsys.readouterr().out.splitlines()
    [total] = [line.split() for line in said if line.startswith("all workers")]
    assert total[-2] == "24.0"
    assert float(total[-3]) < 0.95 * 24
    assert sum(" x 0." in line and line.endswith(" GPU") for line in said) == 3


def test_gpus_of_unknown_size_are_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run_file), "--gpus", "8"]) == 1
    assert capsys.readouterr().err == ("preceptor: --gpus 8: this machine has none to look at; add --gpu-memory GIB\n")


def test_a_teachers_server_is_not_asked_and_takes_no_gpu(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = ("teachers.main.url=http://localhost:9/v1", "teachers.main.model=served")  # nobody listens there
    assert main(["plan", str(run_file), *served, "--gpus", "7", "--gpu-memory", "80"]) == 0
    assert not any(line.startswith("teacher-main ") for line in capsys.readouterr().out.splitlines())  # in the table
    wrong = ("objective.support=full",)  # no server gives whole distributions
    assert main(["plan", str(run_file), *served, *wrong, "--gpus", "7", "--gpu-memory", "80"]) == 1
    assert "teachers.main: " in capsys.readouterr().err
