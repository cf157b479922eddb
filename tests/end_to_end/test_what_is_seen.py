"""What a person is shown of a real run: Ray's metrics and `status` while it lives, its files after."""

import json
import math
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.grafana import DASHBOARD, exported_name
from cluster.monitoring.metric_table import COMPLETION_LENGTHS, EVERY_STEP, all_metrics
from tests.end_to_end.conftest import STEPS, ShortRun, records_of
from tests.end_to_end.runs import ENDED_SECONDS, Run, preceptor, running
from tests.leak_check import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POOLS = {"rollout", "teacher-countdown", "learner"}
SEEN_SECONDS = 120.0
OFTEN = {"RAY_metrics_report_interval_ms": "1000"}  # how often Ray brings figures to its endpoint, instead of 10,000
# Begin metrics that only runs with a privileged sampler (test_privileged.py), or with several turns, have.
OF_OTHER_RUNS = ("privileged/", "rollout/turns", "rollout/environment_errors")
SERIES = re.compile(r"(ray_preceptor_\w+)\{")


@dataclass(frozen=True)
class Shown:
    """What was seen of a run while it lived, and when it had been stopped."""

    path: Path
    output: str
    series: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)  # name -> labels, value
    living: dict[str, Any] = field(default_factory=dict)
    stopped: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)  # of processes, shared memory and files after the stop


def scrape(run: Run, found: dict[str, list[tuple[dict[str, str], float]]]) -> dict[str, Any]:
    """Add what all endpoints say that Ray names to Prometheus, which keeps what one scrape has and the next has not."""
    for discovery in run.watch.temporary.glob("preceptor-*/ray/prom_metrics_service_discovery.json"):
        for target in json.loads(discovery.read_text())[0]["targets"]:
            # Ray names an endpoint before it answers.
            with suppress(URLError), urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    for sample in family.samples:
                        found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def asked_for() -> set[str]:
    """Return every series that a query of the dashboard names."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {name for panel in panels for target in panel.get("targets", []) for name in SERIES.findall(target["expr"])}


def of_this_run() -> set[str]:
    """Return those that every run has."""
    others = {exported_name(metric) for metric in all_metrics() if metric.source.startswith(OF_OTHER_RUNS)}
    return asked_for() - others


def status(directory: Path) -> dict[str, Any]:
    found = preceptor("status", str(directory), "--json")
    assert found.code == 0, found.error
    report: dict[str, Any] = json.loads(found.output)
    return report


@pytest.fixture(scope="module")
def shown(preloaded: None, short_run: ShortRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Resume the short run in its middle, watch it until every figure is on the endpoint, and stop it in order."""
    directory = tmp_path_factory.mktemp("seen")
    shutil.copytree(short_run.path, directory / "run")
    shutil.rmtree(directory / f"run/checkpoints/step-{STEPS}")
    settings = ("run.steps=100000", "ray.dashboard=true", "evaluation.every_steps=1", "evaluation.num_prompts=16")
    command = ("train", "--resume", str(directory / "run"))
    with running(directory, *settings, command=command, is_forked=True, **OFTEN) as run:
        run.wait_for(f"step {STEPS} ")
        series: dict[str, list[tuple[dict[str, str], float]]] = {}
        wait_until(lambda: of_this_run() <= scrape(run, series).keys(), SEEN_SECONDS, poll_seconds=1)
        living = status(run.directory)
        run.signal_group(signal.SIGINT)
        assert run.process.wait(ENDED_SECONDS) == 130, "".join(run.lines)
        yield Shown(run.directory, "".join(run.lines), series, living, status(run.directory), run.left())


def test_a_resumed_run_does_the_same_steps_again(short_run: ShortRun, shown: Shown) -> None:
    assert f"resuming after step {STEPS // 2}" in shown.output
    first, again = short_run.records(), records_of(shown.path)
    assert [record["step"] for record in again] == list(range(1, len(again) + 1))
    for undisturbed, resumed in zip(first[STEPS // 2 :], again[STEPS // 2 : STEPS], strict=True):
        assert resumed["completion_tokens"] == undisturbed["completion_tokens"]
        assert resumed["train/loss"] == pytest.approx(undisturbed["train/loss"], abs=1e-4)
    # Nothing is lost and nothing repeated: to the letter, the ledger is that of the undisturbed run.
    ledger = (shown.path / "ledger.jsonl").read_text()
    assert ledger.startswith((short_run.path / "ledger.jsonl").read_text())


def test_the_first_evaluation_survives_the_interruption(short_run: ShortRun, shown: Shown) -> None:
    before, after = (newest_history(path) for path in (short_run.path, shown.path))
    for name in ("teacher_accuracy", "first_accuracy", "first_kl", "first_sample"):
        assert after[name] == before[name] is not None, name


def newest_history(path: Path) -> dict[str, Any]:
    """Return what the run's last checkpoint says of its evaluations."""
    newest = max((path / "checkpoints").iterdir(), key=lambda folder: int(folder.name.removeprefix("step-")))
    history: dict[str, Any] = json.loads((newest / "state.json").read_text())["history"]
    return history


def test_every_query_of_the_dashboard_finds_finite_values_of_the_run(shown: Shown) -> None:
    assert len(asked_for()) == len(all_metrics())
    for name in of_this_run():
        samples = shown.series.get(name, [])
        assert samples, f"{name} is not on Ray's metrics endpoint"
        assert all(labels["run"] == "run" and math.isfinite(value) for labels, value in samples), name


def test_metrics_of_pools_are_there_for_every_pool(shown: Shown) -> None:
    for metric in all_metrics():
        if metric.is_per_pool:
            pools = {labels["pool"] for labels, _ in shown.series[exported_name(metric)]}
            expected = POOLS - {"learner"} if metric.name == "preceptor_pool_tokens_per_second" else POOLS
            assert pools == expected, metric.name


def test_a_living_run_shows_its_pools_by_its_directory_alone(shown: Shown) -> None:
    living = shown.living
    assert living["state"] == "running"
    assert living["step"] >= STEPS
    assert {pool["name"]: len(pool["workers"]) for pool in living["pools"]} == dict.fromkeys(POOLS, 1) | {"learner": 2}
    assert living["tokens_per_second"] > 0
    assert living["held_out"]["step"] >= STEPS - 1
    assert all(0 < pool["busy_share"] <= 1 for pool in living["pools"])


def test_a_run_that_was_stopped_says_so_and_where_it_goes_on(shown: Shown) -> None:
    assert shown.stopped["state"] == "stopped"
    assert f"stopped after step {shown.stopped['step']}" in shown.stopped["error"]
    assert shown.stopped["last_checkpoint"] == shown.stopped["step"]


def test_nothing_stays_of_a_run_that_was_interrupted_once(shown: Shown) -> None:
    assert shown.left == []


def test_every_metric_of_the_table_is_one_of_the_run(short_run: ShortRun) -> None:
    found = {name for record in short_run.records() for name in record}
    sources = {metric.source.replace("{pool}", "rollout") for metric in all_metrics()}
    sources = {source for source in sources if not source.startswith(OF_OTHER_RUNS)}
    assert sources - found == {EVERY_STEP, COMPLETION_LENGTHS}


def test_a_finished_run_has_ended_with_all_its_steps(short_run: ShortRun) -> None:
    report = status(short_run.path)
    assert (report["state"], report["step"], report["last_checkpoint"]) == ("ended", STEPS, STEPS)
    assert report["held_out"]["accuracy"] == short_run.records()[-1]["held_out/accuracy"]


def test_the_timeline_shows_every_stage_on_every_worker(short_run: ShortRun) -> None:
    events = json.loads((short_run.path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    stages = {(names[event["pid"]], event["name"]) for event in events if event["ph"] == "X"}
    ranks = {(f"learner-{rank}", stage) for rank in range(2) for stage in ("learn", "sync")}
    assert stages == {("rollout-0", "generate"), ("rollout-0", "sync"), ("teacher-countdown-0", "score")} | ranks
    written = [event["args"]["tokens"] for event in events if event["name"] == "generate"]
    learned = sum(record["completion_tokens"] for record in short_run.records())
    held_out = sum(record["held_out/tokens"] for record in short_run.records() if "held_out/tokens" in record)
    last = short_run.records()[-1]["held_out/tokens"]  # after the last step, so in no step's calls
    assert sum(written) == learned + held_out - last


def test_tensorboard_has_one_event_per_step(short_run: ShortRun) -> None:
    [path] = (short_run.path / "tensorboard").iterdir()
    assert path.read_bytes().count(b"train/kl") == STEPS
