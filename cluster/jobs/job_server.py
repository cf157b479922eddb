"""Talks to the job server of a Ray cluster: submits a command, follows what it prints, stops it."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from packaging.version import Version
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.contracts.errors import JobError
from cluster.nodes.ray_session import TOKEN_ADVICE

OLDEST_RAY = "2.60"  # as pyproject.toml asks for it
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
CHECK_SECONDS = 1.0  # between two questions how a job is doing
AGENT_SECONDS = 60.0  # for a head that has just started to have an agent that takes jobs
NO_AGENT = "No available agent"  # Ray's words where it has none
LOST_SECONDS = 30.0  # without any answer: the head is gone
FLUSH_SECONDS = 5.0  # for a job's last lines to arrive when it has ended
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # between Ray's SIGTERM and its SIGKILL; 3 if not set
# These say what they upload and that a connection was closed, between the lines of the job.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
# Ray's client takes these over the address that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Job:
    """Describes a command, and what it needs."""

    job_id: str
    entrypoint: str  # a line for the shell
    variables: Mapping[str, str]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Ending:
    """Describes how a job ended."""

    status: JobStatus
    exit_code: int | None  # None: it was stopped, or never ran
    last_line: str  # of what it printed, or what Ray says of it


class JobServer:
    """Talks to a cluster's job server, at the address of its dashboard."""

    def __init__(self, address: str | None) -> None:
        """Connect; raise JobError if nothing answers there, the token is not the cluster's, or its Ray is too old."""
        self.address = _url(address)
        for talkative in _TALKATIVE:
            logging.getLogger(talkative).setLevel(logging.WARNING)
        with _without(_ADDRESS_VARIABLES), self._in_our_words():
            ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one, the client ends this process
            self._client = _Client(self.address)
        version = self._client._server_ray_version
        if Version(version) < Version(OLDEST_RAY):
            raise JobError(
                f"{self.address}: the cluster runs Ray {version}; Preceptor needs {OLDEST_RAY} or newer there"
            )

    def submit(self, job: Job, folder: Path) -> None:
        when_ready(lambda: self._submit(job, folder))

    def _submit(self, job: Job, folder: Path) -> None:
        with self._in_our_words():
            self._client.submit_job(
                submission_id=job.job_id,
                entrypoint=job.entrypoint,
                runtime_env={"working_dir": str(folder), "env_vars": dict(job.variables)},
                metadata=dict(job.metadata),
            )

    def follow(self, job_id: str, write: Callable[[str], None]) -> Ending:
        """Write what a job has printed and prints, and return how it ended; raise JobError if the cluster is lost."""
        output = _Output(write)
        details = asyncio.run(self._follow(job_id, output))
        return _ending(details, output.last_line)

    def stop(self, job_id: str) -> float:
        """Ask Ray to send SIGTERM to a running job, and return how many seconds later it would send SIGKILL."""
        details = self._details(job_id)
        with self._in_our_words():
            if details.status.is_terminal() or not self._client.stop_job(job_id):
                raise JobError(f"{job_id} does not run: {details.status}")
        variables = (details.runtime_env or {}).get("env_vars") or {}
        return float(variables.get(STOP_WAIT_VARIABLE, 3))

    def wait(self, job_id: str, seconds: float) -> Ending:
        """Wait until a job has ended; raise JobError if it has not, in so many seconds."""
        deadline = time.monotonic() + seconds
        while not (details := self._details(job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise JobError(f"waited {seconds:.0f} s for {job_id} to end; it is {details.status}")
            time.sleep(CHECK_SECONDS)
        output = _Output(lambda text: None)
        with self._in_our_words():
            output.take(self._client.get_job_logs(job_id), 0)
        return _ending(details, output.last_line)

    async def _follow(self, job_id: str, output: "_Output") -> JobDetails:
        details = await asyncio.to_thread(self._details, job_id)
        tail = asyncio.create_task(self._tail(job_id, output))
        while not details.status.is_terminal():
            await asyncio.wait({tail}, timeout=CHECK_SECONDS)
            # A connection without traffic looks the same whether the head lives or not, so it is asked.
            details = await asyncio.to_thread(self._details, job_id)
            if tail.done() and not details.status.is_terminal():
                await asyncio.sleep(CHECK_SECONDS)
                tail = asyncio.create_task(self._tail(job_id, output))
        if tail.done() and not tail.result():
            tail = asyncio.create_task(self._tail(job_id, output))
        await asyncio.wait({tail}, timeout=FLUSH_SECONDS)
        tail.cancel()
        return details

    async def _tail(self, job_id: str, output: "_Output") -> bool:
        """Pass on what a job prints, from its first character, and return whether that was all of it."""
        position = 0
        with suppress(RuntimeError, OSError, aiohttp.ClientError):
            async for text in self._client.tail_job_logs(job_id):
                output.take(text, position)
                position += len(text)
            return True
        return False  # the connection broke

    def _details(self, job_id: str) -> JobDetails:
        """Ask how a job is doing, for as long as a head may be silent."""
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return self._client.get_job_info(job_id)
            except (OSError, ValueError, RuntimeError) as error:
                if "status code 404" in str(error):
                    raise JobError(f"{self.address}: the cluster knows no job {job_id}") from error
                if time.monotonic() > deadline:
                    raise JobError(
                        f"{self.address} has not answered for {LOST_SECONDS:.0f} s; if the cluster's head is lost, "
                        f"{job_id} is lost with it, and preceptor submit --resume goes on from its last checkpoint"
                    ) from error
            time.sleep(CHECK_SECONDS)

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        try:
            yield
        except JobError:
            raise
        except AuthenticationError as error:
            raise JobError(f"{self.address}: the cluster refuses this token; {TOKEN_ADVICE}") from error
        except (OSError, ValueError, LookupError) as error:
            raise JobError(
                f"{self.address}: no job server of a Ray cluster answers there; the address is that of the cluster's "
                f"dashboard, for example http://head:8265 ({type(error).__name__})"
            ) from error
        except RuntimeError as error:
            raise JobError(f"{self.address}: {error}") from error


def when_ready(
    submit: Callable[[], None], patience_seconds: float = AGENT_SECONDS, pause_seconds: float = CHECK_SECONDS
) -> None:
    """Submit again while the cluster, which may have just started, has no agent yet that takes jobs."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return submit()
        except JobError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause_seconds)


@dataclass
class _Output:
    """Writes what a job prints once, though it may arrive again after a broken connection."""

    write: Callable[[str], None]
    last_line: str = field(default="", init=False)
    _shown: int = field(default=0, init=False)  # characters
    _open: str = field(default="", init=False)  # of the line that has not ended

    def take(self, text: str, position: int) -> None:
        new = text[max(0, self._shown - position) :]
        if not new:
            return
        self.write(new)
        self._shown += len(new)
        lines = (self._open + new).split("\n")
        self._open = lines[-1]
        self.last_line = next((line for line in reversed(lines) if line.strip()), self.last_line)


class _Client(JobSubmissionClient):
    """Limits the waiting of Ray's client, which would wait for ever for an answer."""

    def _do_request(self, *arguments: Any, **options: Any) -> Any:
        return super()._do_request(*arguments, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)


def _ending(details: JobDetails, last_line: str) -> Ending:
    never_ran = details.status == JobStatus.FAILED and details.driver_exit_code is None
    return Ending(details.status, details.driver_exit_code, (details.message or "") if never_ran else last_line)


def _url(address: str | None) -> str:
    address = address or os.environ.get(_ADDRESS_VARIABLES[0])
    if not address:
        raise JobError("no --address given, for example --address http://head:8265, and RAY_API_SERVER_ADDRESS not set")
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://")):
        raise JobError(f"{address}: jobs go to the cluster's dashboard; give its address, as in http://head:8265")
    return url


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
