"""Runs `preceptor submit`, `follow` and `stop` for runs that are jobs of a Ray cluster."""

import math
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ray.job_submission import JobStatus

from cluster.config.data_source import parse_source
from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError, JobError, in_one_line
from cluster.jobs.job_server import STOP_WAIT_VARIABLE, Job, JobServer

MAX_BYTES = 100 << 20  # the head keeps it in memory, and every node fetches it
STOPPED = 130  # as a run that ends on Ctrl-C
AFTER_KILL_SECONDS = 30.0  # until Ray notes that a job which it killed has ended
SHARED = "put it on storage that all nodes share and give its absolute path"


@dataclass(frozen=True)
class NamedFile:
    """Names a file or folder that travels."""

    field: str  # of the run file
    path: Path  # relative to the current folder, there and here

    @property
    def size_bytes(self) -> int:
        below = [Path(parent, name) for parent, _, names in os.walk(self.path) for name in names]
        return sum(path.stat().st_size for path in (below or [self.path]))


def check_for_cluster(config: Config) -> None:
    """Refuse a run that names a cluster of its own, or that would write to a folder which Ray deletes."""
    if config.ray.address is not None:
        raise ConfigError(
            f"ray.address is '{config.ray.address}', but a submitted run uses the cluster that it is submitted to; "
            "remove it"
        )
    if not Path(config.run.directory).is_absolute():
        raise ConfigError(
            f"run.directory is '{config.run.directory}', which on a cluster is below a temporary folder; give an "
            "absolute path on storage that the head and the learner's nodes share: run.directory=/shared/runs"
        )


def files_to_send(config: Config) -> list[NamedFile]:
    """Return what the configuration names by a path relative to the current folder.

    A model that is not there is taken for a hub id; an absolute path is the cluster's.

    Raises:
        ConfigError: a prompt file is missing, a path leads out of the current folder, or all of it is too large.
    """
    files = [
        NamedFile(field, Path(text))
        for field, text, is_model in _named(config)
        if not Path(text).is_absolute() and not (is_model and not Path(text).exists())
    ]
    for file in files:
        if ".." in file.path.parts:
            raise ConfigError(f"{file.field}: '{file.path}' leads out of the current folder; {SHARED}")
        if not file.path.exists():
            raise ConfigError(f"{file.field}: '{file.path}' is not in the current folder")
    sizes = {file.path: file.size_bytes for file in files}
    if sum(sizes.values()) > MAX_BYTES:
        largest = max(files, key=lambda file: sizes[file.path])
        raise ConfigError(
            f"{largest.field}: '{largest.path}' has {sizes[largest.path] / 1e6:.1f} MB of the "
            f"{sum(sizes.values()) / 1e6:.1f} MB that would travel with the run, and up to {MAX_BYTES / 1e6:.1f} MB "
            f"do; {SHARED}"
        )
    return files


def copy_files(run_file: Path, files: list[NamedFile], folder: Path) -> Path:
    """Copy the run file and what it names into a folder, and return where the run file is in it."""
    inside = not run_file.is_absolute() and ".." not in run_file.parts
    place = run_file if inside else Path(run_file.name)
    for source, target in [(run_file, place), *((file.path, file.path) for file in files)]:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, folder / target)
    return place


def _named(config: Config) -> Iterator[tuple[str, str, bool]]:
    """Yield each field that names a file, its text, and whether it is a model."""
    yield "student.model", config.student.model, True
    for name, teacher in config.teachers.items():
        if teacher.url is None:
            yield f"teachers.{name}.model", teacher.model, True
        elif teacher.tokenizer is not None:
            yield f"teachers.{name}.tokenizer", teacher.tokenizer, True
    for name, text in (("train", config.prompts.train), ("held_out", config.prompts.held_out)):
        source = None if text is None else parse_source(text)
        if source is not None and source.kind in ("file", "folder"):
            yield f"prompts.{name}", source.place, False


@dataclass(frozen=True)
class Submission:
    """Holds the arguments of `preceptor submit`."""

    run_file: Path
    overrides: Sequence[str]
    address: str | None
    python: str = "python"  # of the cluster's nodes
    variables: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False


def submit_run(submission: Submission, config: Config, wait: bool) -> int:
    """Start a run as a job and follow it; return its exit code, or 0 at once without `wait`."""
    check_for_cluster(config)
    files = files_to_send(config)
    server = JobServer(submission.address)
    with tempfile.TemporaryDirectory() as folder:
        run_file = copy_files(submission.run_file, files, Path(folder))
        job = make_job(submission, config, run_file)
        server.submit(job, Path(folder))
    _say(f"submitted {job.job_id} to {server.address}")
    if not wait:
        _say(f"follow it with: preceptor follow {job.job_id} --address {server.address}")
        return 0
    return _follow(server, job.job_id)


def follow_job(address: str | None, job_id: str) -> int:
    """Show what a job has printed and prints, and return its exit code."""
    return _follow(JobServer(address), job_id)


def stop_job(address: str | None, job_id: str) -> int:
    """End a job that runs, in order, as Ctrl-C ends a run: its step is finished and a checkpoint written."""
    server = JobServer(address)
    grace_seconds = server.stop(job_id)
    _say(f"{job_id} ends when its step is done and a checkpoint is written, or is killed in {grace_seconds:.0f} s")
    ending = server.wait(job_id, grace_seconds + AFTER_KILL_SECONDS)
    _say(f"{job_id} has ended: {ending.last_line}")
    return 0


def make_job(submission: Submission, config: Config, run_file: Path) -> Job:
    """Describe the job of a run: `preceptor train` with the same run file and overrides."""
    directory = str(Path(config.run.directory) / config.run.name)
    what = ["--resume", directory] if submission.resume else [str(run_file)]
    words = [submission.python, "-m", "cluster.cli", "train", *what, *submission.overrides]
    name = re.sub(r"[^A-Za-z0-9-]+", "-", config.run.name)
    return Job(
        job_id=f"preceptor-{name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        # `exec`: the run itself, not a shell around it, gets Ray's SIGTERM.
        entrypoint=f"exec {shlex.join(words)}",
        # The end of a run takes a step and a checkpoint; Ray would kill it after 3 s.
        variables={STOP_WAIT_VARIABLE: str(math.ceil(config.ray.call_timeout_seconds)), **submission.variables},
        metadata={"run": config.run.name, "run_directory": directory, "run_file": submission.run_file.name},
    )


def parse_variables(texts: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE texts; one that is something else is a ConfigError."""
    for text in texts:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", text):
            raise ConfigError(f"--env '{text}': expected NAME=VALUE, for example --env HF_HOME=/shared/hf")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _follow(server: JobServer, job_id: str) -> int:
    try:
        ending = server.follow(job_id, _show)
    except KeyboardInterrupt:
        where = f"{job_id} --address {server.address}"
        _say(f"{job_id} goes on; preceptor follow {where} shows it again, preceptor stop {where} ends it in order")
        return STOPPED
    if ending.status == JobStatus.SUCCEEDED:
        return 0
    if ending.status == JobStatus.STOPPED:
        _say(f"{job_id} was stopped")
        return STOPPED
    if ending.exit_code is None:
        raise JobError(f"{job_id} did not run: {ending.last_line}")
    _say(f"{job_id} failed with exit code {ending.exit_code}: {in_one_line(ending.last_line)}")
    return ending.exit_code if 0 < ending.exit_code < 256 else 1


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(sentence: str) -> None:
    sys.stderr.write(f"preceptor: {sentence}\n")
