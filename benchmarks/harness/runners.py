"""Runs one side of the end-to-end comparison and measures a range of its steps from outside.

Ours is the command that a user types, stopped once the range is done; TRL's is `benchmarks.trl.baseline` in its own
environment. Both sides are clocked from the end of the step before the range to the end of its last step, so that
nothing a loop does between two steps is left out.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.model_pairs import PAIRS, ROOT, machine_overrides, pair_config
from benchmarks.harness.process_trees import cpu_seconds, descendants, end, spent
from benchmarks.trl.environment import make_environment

POLL_SECONDS = 0.01
STOP_SECONDS = 60.0
SHOWN_CHARACTERS = 3000  # of what a failed program printed
# So that the last measured step is not the last of the run: with staleness, it has steps to run ahead for.
STEPS_AFTER = 3
OURS_ONLY = (
    "objective.preset=exact-reverse-kl",
    "evaluation.teacher_too=false",
    "evaluation.num_prompts=1",
    "evaluation.every_steps=0",
    "checkpoint.export=false",
)


@dataclass(frozen=True)
class Span:
    """The measured steps of a run."""

    warm_up: int  # steps before them
    steps: int

    @property
    def end(self) -> int:
        """Return how many steps are done when the last measured one is."""
        return self.warm_up + self.steps

    def run_steps(self, run_file_steps: int) -> int:
        """Return what both sides are told that the run has; the learning rate's schedule depends on it."""
        return max(run_file_steps, self.end + STEPS_AFTER)


@dataclass(frozen=True)
class Measured:
    """What one program did in the measured steps."""

    steps: int
    seconds: float
    cpu_seconds: float  # of all its processes
    completion_tokens: int
    longest_tokens: float  # longest completion of a step, mean over steps
    load_average: float  # before it was started

    @property
    def tokens_per_second(self) -> float:
        """Return completion tokens per second."""
        return self.completion_tokens / self.seconds

    @property
    def cpu_seconds_per_1000_tokens(self) -> float:
        """Return CPU-seconds per 1,000 completion tokens."""
        return 1000 * self.cpu_seconds / self.completion_tokens


@dataclass(frozen=True)
class Runner:
    """One side."""

    name: str
    trainer: str | None = None  # of TRL; None: Preceptor
    options: tuple[str, ...] = ()  # overrides of ours, or options of `trl_baseline`

    def run(self, pair: str, span: Span, overrides: Sequence[str]) -> Measured:
        """Train until the measured steps are done.

        Raises:
            SystemExit: the program failed; says what it printed last.
        """
        run_steps = span.run_steps(pair_config(pair, overrides).run.steps)
        overrides = [*machine_overrides(pair), *overrides, f"run.steps={run_steps}"]
        with tempfile.TemporaryDirectory() as folder:
            if self.trainer is None:
                return _run_preceptor(pair, span, [*overrides, *OURS_ONLY, *self.options], Path(folder))
            arguments = ["--pair", pair, "--trainer", self.trainer, *self.options, *overrides]
            return _run_trl(span, arguments, Path(folder))


def _run_preceptor(pair: str, span: Span, overrides: Sequence[str], folder: Path) -> Measured:
    command = [sys.executable, "-m", "cluster.cli", *PAIRS[pair].command, f"run.directory={folder}", "run.name=run"]
    metrics, load_average = folder / "run/metrics.jsonl", os.getloadavg()[0]
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [*command, *overrides], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            started, cpu_before = _when_done(span.warm_up, metrics, process, folder)
            ended, cpu_after = _when_done(span.end, metrics, process, folder)
        finally:
            _stop(process)
    steps = _read_steps(metrics, span)
    return Measured(
        steps=span.steps,
        seconds=ended - started,
        cpu_seconds=spent(cpu_before, cpu_after),
        completion_tokens=int(sum(step["completion_tokens"] for step in steps)),
        longest_tokens=statistics.mean(step["rollout/completion_length_max"] for step in steps),
        load_average=load_average,
    )


def _run_trl(span: Span, arguments: Sequence[str], folder: Path) -> Measured:
    lines, load_average = folder / "steps.jsonl", os.getloadavg()[0]
    command = [str(make_environment()), "-m", "benchmarks.trl.baseline", "--steps", str(span.end)]
    with (folder / "output").open("w+") as output:
        found = subprocess.run(
            [*command, "--output", str(lines), *arguments], cwd=ROOT, stdout=output, stderr=output, check=False
        )
    if found.returncode:
        raise _failed("TRL", folder)
    steps = _read_steps(lines, span)
    return Measured(
        steps=span.steps,
        seconds=sum(step["seconds"] for step in steps),
        cpu_seconds=sum(step["cpu_seconds"] for step in steps),
        completion_tokens=int(sum(step["completion_tokens"] for step in steps)),
        longest_tokens=statistics.mean(step["longest_completion_tokens"] for step in steps),
        load_average=load_average,
    )


def _when_done(
    steps: int, metrics: Path, process: subprocess.Popen[bytes], folder: Path
) -> tuple[float, dict[int, float]]:
    """Wait until a run has recorded so many steps; return the time and what its processes have computed.

    A run that hangs ends by the time limits of its own waits.
    """
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        if process.poll() is not None:
            raise _failed("Preceptor", folder)
        time.sleep(POLL_SECONDS)
    return time.perf_counter(), cpu_seconds(descendants(process.pid))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a run as Ctrl-C does, and see that nothing of it stays."""
    everything = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    end(everything)


def _read_steps(lines: Path, span: Span) -> list[dict[str, float]]:
    """Return the measured steps of JSON lines, ours or those of `trl_baseline`."""
    return [json.loads(line) for line in lines.read_text().splitlines()][span.warm_up : span.end]


def _failed(program: str, folder: Path) -> SystemExit:
    printed = (folder / "output").read_text(errors="replace")[-SHOWN_CHARACTERS:]
    return SystemExit(f"{program} ended before the measured steps were done; it printed last:\n{printed}")
