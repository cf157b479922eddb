"""The example manifests as far as they can be tried without Kubernetes and Slurm."""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import _split, make_parser, train
from cluster.install.install import SUPPORTED_PYTHONS
from cluster.placement.placement import NodeResources, plan_placement
from tests.builders import make_config
from tests.leak_check import wait_until

EXAMPLES = Path(__file__).parent.parent.parent / "examples/cluster"
SLURM = EXAMPLES / "slurm.sh"
# The fields of KubeRay's ray.io/v1 types that the manifest may use, as its API reference lists them
# (docs.ray.io/en/master/cluster/kubernetes/references/api.html); below a pod template they are Kubernetes' own.
FIELDS = {
    "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "RayJobSpec": {
        *("entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("rayClusterSpec", "submissionMode", "activeDeadlineSeconds", "suspend", "metadata", "jobId"),
        *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "submitterPodTemplate", "clusterSelector"),
    },
    "RayClusterSpec": {
        *("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "suspend", "managedBy"),
        *("autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headServiceAnnotations"),
    },
    "AuthOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "HeadGroupSpec": {"rayStartParams", "template", "serviceType", "headService", "enableIngress"},
    "WorkerGroupSpec": {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
        *("scaleStrategy", "suspend", "idleTimeoutSeconds"),
    },
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The RayJob."""
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())
    return loaded


def arguments(job: dict[str, Any]) -> list[str]:
    """Return what the job's command is given after `train`."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["exec", "preceptor", "train"]
    return words[3:]


def test_the_job_uses_kuberays_fields_only(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for kind, found in [
        ("RayJob", job),
        ("RayJobSpec", job["spec"]),
        ("RayClusterSpec", cluster),
        ("AuthOptions", cluster["authOptions"]),
        ("HeadGroupSpec", cluster["headGroupSpec"]),
        *(("WorkerGroupSpec", group) for group in cluster["workerGroupSpecs"]),
    ]:
        assert set(found) <= FIELDS[kind], kind
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())


def test_the_jobs_command_is_one_of_ours_and_leaves_time_to_stop(job: dict[str, Any]) -> None:
    assert make_parser().parse_args(["train", *arguments(job)]).command is train
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "1800"}}


def test_every_pod_has_the_shared_volume(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["shared"] == "/shared"
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}


def test_the_run_fills_the_groups_as_their_names_say(job: dict[str, Any]) -> None:
    _, overrides = _split(arguments(job))
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    nodes = [
        NodeResources(*limits(group), node_id=group["groupName"]) for group in groups for _ in range(group["replicas"])
    ]
    placement = plan_placement(make_config(*overrides), nodes)
    assert [node.node_id for node in placement.learner.nodes] == ["learner"] * 8
    assert [node.node_id for node in placement.rollout.nodes] == ["engines"] * 8
    assert [node.node_id for node in placement.teachers["main"].nodes] == ["engines"] * 2


def limits(group: dict[str, Any]) -> tuple[float, int]:
    [container] = group["template"]["spec"]["containers"]
    found = container["resources"]["limits"]
    return float(found["cpu"]), int(found["nvidia.com/gpu"])


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The batch script among commands that only note how they are called, until somebody ends it."""
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "ray": "exec sleep 300",
        "python": "exit 0",
        "preceptor": "trap 'exit 130' TERM; touch \"$RUNS/trains\"; while true; do sleep 0.1; done",
    }
    for name, what in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        notes = f'echo "{name} $*" >> "$RUNS/calls"\nstat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$RUNS/modes"'
        program.write_text(f"#!/bin/bash\n{notes}\n{what}\n")
        program.chmod(0o755)
    process = subprocess.Popen(
        [SLURM, "/shared/run.toml", "name", "run.steps=9"],
        env={
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "RUNS": str(tmp_path),
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_ON_NODE": "16",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_batch_job_starts_a_closed_cluster_and_passes_slurms_signal_on(
    slurm: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    assert wait_until((tmp_path / "trains").exists)
    calls = (tmp_path / "calls").read_text().splitlines()
    [train_call] = [call for call in calls if call.startswith("preceptor ")]
    assert train_call == f"preceptor train /shared/run.toml run.directory={tmp_path} run.name=name run.steps=9"
    assert make_parser().parse_args(train_call.split()[1:]).command is train
    sruns = sorted(call for call in calls if call.startswith("srun "))
    assert any("--nodes=1 --ntasks=1" in call and "ray start --head" in call for call in sruns)
    assert any("--nodes=2 --ntasks=2" in call and "ray start --address=" in call for call in sruns)
    assert set((tmp_path / "modes").read_text().split()) == {"600"}
    slurm.terminate()
    assert slurm.wait(30) == 130
    assert list(tmp_path.glob("token-*")) == []


def test_the_image_has_the_cuda_of_the_lock_and_what_the_installer_asks_for() -> None:
    dockerfile = (EXAMPLES / "Dockerfile").read_text()
    lock = (EXAMPLES.parents[1] / "cluster/install/cuda.lock").read_text()
    [cuda] = re.findall(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu24\.04$", dockerfile, re.MULTILINE)
    assert f"cuda-toolkit=={cuda}." in lock
    installed = dockerfile.partition("apt-get install")[2].partition("&&")[0].split()
    assert {"g++", "gcc", "make", "python3-dev", "python3-venv", "wget"} <= set(installed)
    # Ubuntu 24.04 has Python 3.12.
    assert (3, 12) in SUPPORTED_PYTHONS
    ignored = (EXAMPLES / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
