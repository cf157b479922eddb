from pathlib import Path

import pytest

from cluster.contracts.errors import ConfigError
from cluster.jobs.job_commands import (
    MAX_BYTES,
    Submission,
    check_for_cluster,
    copy_files,
    files_to_send,
    make_job,
    parse_variables,
)
from tests.builders import make_config

HERE = ("prompts.train=data/train.jsonl", "student.model=student", "teachers.main.model=org/teacher")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what a run needs and what it does not."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "data/train.jsonl",
        "data/other.jsonl",
        "student/config.json",
        "student/model.safetensors",
        "run.toml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_what_is_named_travels_and_nothing_else(folder: Path) -> None:
    files = files_to_send(make_config(*HERE))
    assert [file.field for file in files] == ["student.model", "prompts.train"]
    assert copy_files(Path("run.toml"), files, folder / "sent") == Path("run.toml")
    sent = {str(path.relative_to(folder / "sent")) for path in (folder / "sent").rglob("*") if path.is_file()}
    assert sent == {"data/train.jsonl", "student/config.json", "student/model.safetensors", "run.toml"}
    assert (folder / "sent/data/train.jsonl").read_text() == "data/train.jsonl"


def test_a_run_file_from_elsewhere_travels_under_its_name(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "far.toml"
    elsewhere.write_text("far")
    assert copy_files(elsewhere, [], folder / "sent") == Path("far.toml")
    assert (folder / "sent/far.toml").read_text() == "far"


def test_absolute_paths_and_hub_ids_stay(folder: Path) -> None:
    config = make_config("prompts.train=/shared/p.jsonl", "student.model=/shared/s", "teachers.main.model=org/teacher")
    assert files_to_send(config) == []


def test_too_much_is_refused_with_the_largest(folder: Path) -> None:
    with (folder / "student/model.safetensors").open("wb") as file:
        file.truncate(MAX_BYTES)  # with the 19 bytes of its config.json and the 16 of the prompts, 35 too many
    with pytest.raises(ConfigError, match=r"^student.model: 'student' has 104.9 MB of the 104.9 MB .* absolute path$"):
        files_to_send(make_config(*HERE))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("prompts.train=absent.jsonl", "prompts.train: 'absent.jsonl' is not in the current folder"),
        ("prompts.train=../p.jsonl", "prompts.train: '../p.jsonl' leads out of the current folder; put it on storage"),
    ],
)
def test_a_file_that_cannot_travel_is_one_sentence(folder: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        files_to_send(make_config(*HERE, override))
    assert str(error.value).startswith(sentence)


def test_a_run_that_would_write_to_a_temporary_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^run.directory is 'runs', .* run.directory=/shared/runs$"):
        check_for_cluster(make_config())
    check_for_cluster(make_config("run.directory=/shared/runs"))


def test_a_run_that_names_another_cluster_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^ray.address is 'other:6379', .* remove it$"):
        check_for_cluster(make_config("ray.address=other:6379", "run.directory=/shared/runs"))


def test_a_job_is_train_with_the_same_run_file_and_overrides() -> None:
    config = make_config("run.name=my_run", "run.directory=/shared/runs", "ray.call_timeout_seconds=90.5")
    submission = Submission(Path("a/run.toml"), ["prompts.system_prompt=two words"], None, variables={"HF_HOME": "/hf"})
    job = make_job(submission, config, Path("run.toml"))
    assert job.entrypoint == "exec python -m cluster.cli train run.toml 'prompts.system_prompt=two words'"
    assert job.job_id.startswith("preceptor-my-run-")
    assert job.variables == {"RAY_JOB_STOP_WAIT_TIME_S": "91", "HF_HOME": "/hf"}
    assert job.metadata == {"run": "my_run", "run_directory": "/shared/runs/my_run", "run_file": "run.toml"}


def test_a_resumed_job_goes_on_in_the_runs_own_folder() -> None:
    config = make_config("run.name=r", "run.directory=/shared/runs")
    job = make_job(Submission(Path("run.toml"), ["run.steps=9"], None, resume=True), config, Path("run.toml"))
    assert job.entrypoint == "exec python -m cluster.cli train --resume /shared/runs/r run.steps=9"


def test_variables_are_name_and_value() -> None:
    assert parse_variables(["A=b=c", "D="]) == {"A": "b=c", "D": ""}
    with pytest.raises(ConfigError, match=r"^--env 'A': expected NAME=VALUE"):
        parse_variables(["A"])
