"""Who may enter a cluster: real ones, entered from processes of their own."""

import json
import os
import platform
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.nodes import reaper
from tests.leak_check import wait_until, without_ray

ENTRY_SECONDS = 120
AT_ONCE_SECONDS = 30  # on a busy machine
WRONG_TOKEN = "0" * 64
pytestmark = pytest.mark.slow


@contextmanager
def entrant(*overrides: str, home: Path, **variables: str) -> Iterator[dict[str, Any]]:
    """Open a session in another process; yield what it says about it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.nodes.ray_entrant", *overrides],
        env={**without_ray(os.environ), "HOME": str(home), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(ENTRY_SECONDS)
        process.stdout.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home without a token."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[dict[str, Any]]:
    """A local cluster with its dashboard."""
    with entrant("ray.dashboard=true", home=home) as told:
        yield told


def read_token(cluster: dict[str, Any]) -> str:
    return Path(cluster["token_file"]).read_text()


def ask_dashboard(cluster: dict[str, Any], token: str | None, body: bytes | None = None) -> int:
    """Return the status of a request to the jobs that the dashboard starts and lists."""
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    request = urllib.request.Request(f"http://{cluster['dashboard']}/api/jobs/", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_whoever_has_the_token_enters(cluster: dict[str, Any], home: Path) -> None:
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": cluster["token_file"]}
    with entrant(f"ray.address='{cluster['address']}'", home=home, **variables) as told:
        assert told["answer"] == 42


@pytest.mark.parametrize(
    "variables",
    [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG_TOKEN}],
    ids=["without a token", "with a mode alone", "with another token"],
)
def test_nobody_else_does_and_hears_why_at_once(cluster: dict[str, Any], home: Path, variables: dict[str, str]) -> None:
    with entrant(f"ray.address='{cluster['address']}'", home=home, **variables) as told:
        assert told["error"] == "PlacementError"
        assert told["sentence"] == (
            f"ray.address '{cluster['address']}': the cluster refuses this token; set RAY_AUTH_MODE=token and give the "
            "cluster's own token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        )
        assert told["seconds"] < AT_ONCE_SECONDS


def test_an_address_without_a_cluster_is_one_sentence(home: Path) -> None:
    with entrant("ray.address='127.0.0.1:9'", home=home) as told:
        assert told["error"] == "PlacementError"
        assert told["sentence"].startswith("ray.address '127.0.0.1:9': no Ray cluster answers there")
        assert "\n" not in told["sentence"]


AS_ANOTHER = """
import json, sys
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient
versions = json.dumps({"ray_version": "2.9.0", "python_version": "3.8.1"}).encode()
GcsClient(address=sys.argv[1]).internal_kv_put(b"CLUSTER_METADATA", versions, True, namespace=KV_NAMESPACE_CLUSTER)
"""


@pytest.fixture(scope="module")
def open_cluster(home: Path) -> Iterator[dict[str, Any]]:
    """A local cluster whose user has turned tokens off."""
    with entrant("ray.dashboard=false", home=home, RAY_AUTH_MODE="disabled") as told:
        yield told


def test_a_user_may_turn_tokens_off(open_cluster: dict[str, Any], home: Path) -> None:
    assert open_cluster["token_file"] is None
    with entrant(f"ray.address='{open_cluster['address']}'", home=home) as entered:
        assert entered["answer"] == 42


def test_a_cluster_with_another_ray_and_python_is_one_sentence(open_cluster: dict[str, Any], home: Path) -> None:
    environment = {**without_ray(os.environ), "RAY_AUTH_MODE": "disabled"}
    subprocess.run([sys.executable, "-c", AS_ANOTHER, open_cluster["address"]], env=environment, check=True)
    with entrant(f"ray.address='{open_cluster['address']}'", home=home, RAY_AUTH_MODE="disabled") as refused:
        assert refused["error"] == "PlacementError"
        assert refused["sentence"] == (
            f"ray.address '{open_cluster['address']}': the driver needs the very Ray and Python of the cluster, to the "
            "last number: the cluster has Ray 2.9.0 with Python 3.8.1, this process Ray "
            f"{ray.__version__} with Python {platform.python_version()}; "
            "use the cluster's, or let preceptor submit start the driver there"
        )


def test_the_dashboard_lists_and_takes_jobs_for_the_token_only(cluster: dict[str, Any]) -> None:
    job = json.dumps({"entrypoint": "true"}).encode()
    for token in (None, WRONG_TOKEN):
        assert ask_dashboard(cluster, token) in (401, 403)
        assert ask_dashboard(cluster, token, job) in (401, 403)
    assert ask_dashboard(cluster, read_token(cluster)) == 200
    # The token lets it through; Ray then answers 500 while the node has no agent to start a job, as it has none while
    # another cluster of this machine holds the agents' fixed port.
    assert ask_dashboard(cluster, read_token(cluster), job) in (200, 500)


def test_the_dashboard_and_the_cluster_are_on_loopback(cluster: dict[str, Any]) -> None:
    assert cluster["dashboard"].startswith("127.0.0.1:")
    assert cluster["address"].startswith("127.0.0.1:")


def test_the_token_is_in_a_private_file_and_in_no_environment(cluster: dict[str, Any]) -> None:
    file = Path(cluster["token_file"])
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    members = reaper.ProcessTree(reaper.MARK, str(file.parent)).count()
    assert len(members) > 3
    environments = [reaper._read(pid, "environ") for pid, _ in members]
    assert any(str(file).encode() in environment for environment in environments)
    assert not any(read_token(cluster).encode() in environment for environment in environments)


def test_the_process_that_starts_a_cluster_keeps_its_own_environment(cluster: dict[str, Any]) -> None:
    assert cluster["changed"] == []
    assert cluster["token_variables"] == []


def test_every_cluster_has_a_token_of_its_own_which_goes_with_it(cluster: dict[str, Any], home: Path) -> None:
    with entrant("ray.dashboard=false", home=home) as told:
        file = Path(told["token_file"])
        assert len(file.read_text()) == 64
        assert file.read_text() != read_token(cluster)
    assert wait_until(lambda: not file.parent.exists(), ENTRY_SECONDS)
    assert not (home / ".ray").exists()


def test_a_token_of_the_user_is_the_clusters(home: Path) -> None:
    token = "ab" * 32
    with entrant("ray.dashboard=false", home=home, RAY_AUTH_TOKEN=token) as told:
        assert told["token_file"] is None
        address = f"ray.address='{told['address']}'"
        with entrant(address, home=home, RAY_AUTH_TOKEN=token, RAY_AUTH_MODE="token") as entered:
            assert entered["answer"] == 42
        with entrant(address, home=home) as refused:
            assert refused["error"] == "PlacementError"


def test_a_token_file_that_is_missing_is_one_sentence(home: Path) -> None:
    with entrant("ray.dashboard=false", home=home, RAY_AUTH_TOKEN_PATH=str(home / "absent")) as told:
        assert told["error"] == "PlacementError"
        assert told["sentence"].startswith("the token for the local Ray cluster cannot be used: ")
