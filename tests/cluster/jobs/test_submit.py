"""Runs as jobs of a cluster: real ones, submitted, followed and stopped by the command line in processes of its own."""

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import JobError
from cluster.contracts.recorded_rows import RecordedBatch, RecordedRows
from cluster.contracts.trajectory import add_scores, make_generated
from cluster.demo import EMBEDDED, embedded_config
from cluster.jobs.job_server import LOST_SECONDS, JobServer
from cluster.run.inputs import load_inputs, train_requests
from tests.builders import make_scores, make_trajectory
from tests.cluster.nodes.test_ray_session import WRONG_TOKEN
from tests.leak_check import short_folder, wait_until, without_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMMAND_SECONDS = 500
SHORT = (
    "run.name=run",
    "prompts.prompts_per_step=16",
    "evaluation.num_prompts=8",
    "evaluation.teacher_too=false",
    "learner.warmup_steps=0",
)
PROMPTS = "prompts={{template='raw', train='{}', prompts_per_step=16}}"  # and none to evaluate with
WRITTEN = range(4, 9)  # the tokens of each row that is replayed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home without a token."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[dict[str, Any]]:
    """A cluster with a dashboard and a token, ready for jobs."""
    with job_cluster(home) as told:
        yield told


@contextmanager
def job_cluster(home: Path) -> Iterator[dict[str, Any]]:
    """Start a cluster as its owner would, at ports that no other cluster of this machine has."""
    token = home / "token"
    token.write_text("ab" * 32)
    ports = free_ports(3)
    options = ("--port", "--dashboard-port", "--dashboard-agent-listen-port")
    folder = short_folder()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    command += ["--temp-dir", str(folder / "ray"), "--object-store-memory", str(200 << 20)]
    command += [f"{option}={port}" for option, port in zip(options, ports, strict=True)]
    told = {"home": home, "folder": folder, "token_file": str(token), "dashboard": f"127.0.0.1:{ports[1]}"}
    process = subprocess.Popen(
        command, env=environment(told), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        # Until the node's agent is up, Ray answers that there is nobody to start a job.
        assert wait_until(lambda: preceptor(told, "submit", *ABSENT, "--no-wait").returncode == 0, COMMAND_SECONDS)
        yield told
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def environment(cluster: dict[str, Any]) -> dict[str, str]:
    """Return what the cluster and those who ask it know."""
    known = {"HOME": str(cluster["home"]), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["token_file"]}
    beside = {"TMPDIR": str(cluster["folder"]), "PYTHONPATH": os.pathsep.join(sys.path)}
    # What vLLM knows of each architecture costs it a process of several seconds; the home of these tests is empty.
    beside["VLLM_CACHE_ROOT"] = os.environ.get("VLLM_CACHE_ROOT") or str(Path.home() / ".cache/vllm")
    return {**without_ray(os.environ), **known, **beside}


ABSENT = ("demo.toml", "run.directory=/tmp", "prompts.train=/absent.jsonl", "--python", sys.executable)


def start(cluster: dict[str, Any], command: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """Start a command in the folder of the embedded run file."""
    address = f"http://{cluster['dashboard']}"
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", command, *arguments[:1], "--address", address, *arguments[1:]],
        # RAY_ADDRESS names another cluster: the one that is asked for must win.
        env={**environment(cluster), "RAY_ADDRESS": "http://127.0.0.1:9", **variables},
        cwd=EMBEDDED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def preceptor(cluster: dict[str, Any], command: str, *arguments: str, **variables: str) -> Any:
    process = start(cluster, command, *arguments, **variables)
    out, err = process.communicate(timeout=COMMAND_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def job_id(submitted: str) -> str:
    """Return the job that a line of the command names."""
    found = re.search(r"submitted (preceptor-run-\d{8}-\d{6}-[0-9a-f]{4}) to http://", submitted)
    assert found, submitted
    return found[1]


# Stands for the Python of the cluster's nodes: what a real run does with its files is the next test.
TRAINER = """#!/bin/sh
echo "called with: $*"
wc -l demo.toml train.jsonl held_out.jsonl student/config.json teacher/config.json
"""


def test_a_submitted_run_brings_its_files_and_its_output_and_exit_code_come_back(
    cluster: dict[str, Any], tmp_path: Path
) -> None:
    trainer = tmp_path / "trainer"
    trainer.write_text(TRAINER)
    trainer.chmod(0o700)
    options = (f"run.directory={tmp_path}", "run.steps=1", *SHORT)
    found = preceptor(cluster, "submit", "demo.toml", *options, "--python", str(trainer))
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"called with: -m cluster.cli train demo.toml {shlex.join(options)}\n" in found.stdout
    lines = {name: int(count) for count, name in re.findall(r"^ *(\d+) (\S+)$", found.stdout, re.MULTILINE)}
    names = ("demo.toml", "train.jsonl", "held_out.jsonl", "student/config.json", "teacher/config.json")
    assert {name: lines[name] for name in names} == {name: (EMBEDDED / name).read_text().count("\n") for name in names}
    assert found.stderr.splitlines()[-1].startswith(f"preceptor: submitted {job_id(found.stderr)}")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows as a run of the embedded pair would record them."""
    folder = tmp_path_factory.mktemp("recorded")
    config = embedded_config([*SHORT, PROMPTS.format(EMBEDDED / "train.jsonl"), f"run.directory={folder}"])
    inputs, directory = load_inputs(config), RunDirectory.create(config)
    rows = [
        make_trajectory(
            inputs.prompts.prompt(request.prompt_id).token_ids,
            WRITTEN,
            trajectory_id=request.trajectory_id,
            prompt_id=request.prompt_id,
            teacher="countdown",
        )
        for request in train_requests(config, inputs, step=0)
    ]
    scores = make_scores(len(rows) * len(WRITTEN), config.objective.support_size, logprob=-4.0)
    scored = add_scores(make_generated(rows), "teacher", scores)
    RecordedRows(directory.rows).write(1, [RecordedBatch(scored, {}, {})], inputs.prompts.checksum)
    return directory.path


# What a stopped run does with its engines: tests/end_to_end/test_what_is_seen.py, on a cluster of its own.
@pytest.mark.parametrize("has_engines", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_run_that_is_stopped_leaves_a_checkpoint_and_can_be_followed_afterwards(
    cluster: dict[str, Any], recorded: Path, tmp_path: Path, has_engines: bool
) -> None:
    replaying = () if has_engines else (f"rollout.replay={recorded}", PROMPTS.format("train.jsonl"))
    options = (f"run.directory={tmp_path}", "run.steps=100000", *SHORT, *replaying, "--python", sys.executable)
    submitted = preceptor(cluster, "submit", "demo.toml", *options, "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    job = job_id(submitted.stderr)
    assert f"preceptor follow {job} --address http://{cluster['dashboard']}" in submitted.stderr
    following = start(cluster, "follow", job)
    figures = tmp_path / "run/metrics.jsonl"
    assert wait_until(lambda: figures.exists() and figures.stat().st_size > 0, seconds=400)
    interrupted = start(cluster, "follow", job)
    assert interrupted.stdout is not None
    interrupted.stdout.readline()
    interrupted.send_signal(signal.SIGINT)
    out, err = interrupted.communicate(timeout=COMMAND_SECONDS)
    where = f"{job} --address http://{cluster['dashboard']}"
    assert interrupted.returncode == 130
    assert err == (
        f"preceptor: {job} goes on; preceptor follow {where} shows it again, preceptor stop {where} ends it in order\n"
    )
    stopped = preceptor(cluster, "stop", job)
    assert stopped.returncode == 0, stopped.stderr
    last = f"go on with preceptor train --resume {tmp_path}/run"
    assert stopped.stderr.endswith(last + "\n")
    assert re.search(r"has ended: preceptor: stopped after step (\d+); ", stopped.stderr)
    out, err = following.communicate(timeout=COMMAND_SECONDS)
    assert following.returncode == 130
    assert out.endswith(last + "\n")
    assert err == f"preceptor: {job} was stopped\n"
    assert re.search(r"^step 1 ", out, re.MULTILINE)
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["student"]["model"] == "student"
    again = preceptor(cluster, "stop", job)
    assert again.returncode == 1
    assert again.stderr == f"preceptor: {job} does not run: STOPPED\n"


def test_a_run_that_fails_gives_its_exit_code_and_last_line(cluster: dict[str, Any]) -> None:
    found = preceptor(cluster, "submit", *ABSENT)
    assert found.returncode == 1
    assert re.search(
        r"^preceptor: \S+ failed with exit code 1: preceptor: /absent.jsonl: cannot read the prompt file.*\n\Z",
        found.stderr,
        re.MULTILINE,
    ), found.stderr


def test_a_run_that_the_cluster_has_no_room_for_says_so_with_numbers(cluster: dict[str, Any], tmp_path: Path) -> None:
    # Without GPUs a worker takes at least a ten-thousandth of a CPU, so two CPUs hold 20,000 workers.
    wanted = (f"run.directory={tmp_path}", "rollout.num_workers=30000", "--python", sys.executable)
    found = preceptor(cluster, "submit", "demo.toml", *wanted)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].endswith(
        " failed with exit code 1: preceptor: rollout worker 20000 needs 0.0001 CPUs on one node, and no node has that "
        "left; the run needs 3.0002 CPUs and the cluster has 2 on 1 nodes"
    )
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": WRONG_TOKEN}], ids=["no token", "another token"]
)
def test_without_the_token_nothing_is_submitted(cluster: dict[str, Any], variables: dict[str, str]) -> None:
    found = preceptor(cluster, "submit", *ABSENT, **variables)
    assert found.returncode == 1
    assert found.stderr == (
        f"preceptor: http://{cluster['dashboard']}: the cluster refuses this token; set RAY_AUTH_MODE=token and give "
        "the cluster's own token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in "
        "~/.ray/auth_token\n"
    )


def test_a_job_that_does_not_exist_is_one_sentence(cluster: dict[str, Any]) -> None:
    found = preceptor(cluster, "follow", "absent")
    assert found.returncode == 1
    assert found.stderr == f"preceptor: http://{cluster['dashboard']}: the cluster knows no job absent\n"


def test_an_address_where_nobody_answers_is_one_sentence_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(JobError, match=r"^http://127.0.0.1:9: no job server of a Ray cluster answers there; "):
        JobServer("127.0.0.1:9")
    assert time.monotonic() - began < LOST_SECONDS / 2  # a cluster that is lost is asked again for LOST_SECONDS


@pytest.mark.parametrize("address", ["ray://head:10001", "head://8265"])
def test_an_address_of_another_kind_is_one_sentence(address: str) -> None:
    with pytest.raises(JobError) as error:
        JobServer(address)
    assert str(error.value) == (
        f"{address}: jobs go to the cluster's dashboard; give its address, as in http://head:8265"
    )


class OldHead(http.server.BaseHTTPRequestHandler):
    """A cluster of another time."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"version": "4", "ray_version": "2.9.0"}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_cluster_with_an_old_ray_is_one_sentence() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), OldHead)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever).start()
    try:
        with pytest.raises(JobError) as error:
            JobServer(address)
    finally:
        server.shutdown()
        server.server_close()
    assert str(error.value) == f"{address}: the cluster runs Ray 2.9.0; Preceptor needs 2.60 or newer there"


@pytest.mark.exhaustive
def test_who_follows_hears_that_the_head_is_lost(home: Path) -> None:
    sleeper = home / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o700)
    with job_cluster(home) as cluster:
        submitted = preceptor(cluster, "submit", *ABSENT, "--no-wait", "--python", str(sleeper))
        following = start(cluster, "follow", job_id(submitted.stderr))
        assert following.stdout is not None
        assert str(sleeper) in following.stdout.readline() + following.stdout.readline()
    _, err = following.communicate(timeout=LOST_SECONDS + 60)
    assert following.returncode == 1
    assert f"has not answered for {LOST_SECONDS:.0f} s; if the cluster's head is lost" in err
    assert err.count("\n") == 1
