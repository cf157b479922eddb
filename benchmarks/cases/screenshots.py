"""`python -m benchmarks.cases.screenshots`: pictures of Ray's dashboard and of Prometheus during a submitted run.

A Ray cluster of several hosts (harness/hosts.py), the embedded run submitted to it, a Prometheus that reads the
endpoints which Ray names, and a headless Chromium that looks at the pages of all that while the run goes on. Each
page's text must name what it is there to show (the run's actors, its hosts, its figures) or the program fails with what
is missing. The pictures go to docs/images. Needs `chromium` and `prometheus` on PATH, and root.
"""

import argparse
import platform
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray._private.authentication.authentication_constants import AUTHENTICATION_TOKEN_COOKIE_NAME

from benchmarks.cases.chaos import last_record
from benchmarks.cases.dashboard_queries import DISCOVERY
from benchmarks.harness.browser import Page, chromium
from benchmarks.harness.hosts import FOLDER, Rack, isolated
from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.prometheus import Prometheus, prometheus
from benchmarks.harness.ray_cluster import HEAD, Door, cluster_of_hosts, submit, wait_until

IMAGES = ROOT / "docs" / "images"
NODES = ("node-1", "node-2")
WIDTH = 1400  # points
SCALE = 0.75  # pixels per point: what is written stays readable, and the file small
LARGEST_BYTES = 300_000
PAGE_SECONDS = 60.0
START_SECONDS = 200.0
RUNS = FOLDER / "runs"
POINTS = 12  # of a line, at least
RUN = (
    "run.name=countdown",
    "run.steps=100000",
    "rollout.num_workers=2",
    "learner.num_workers=2",
    "prompts.prompts_per_step=48",
    "evaluation.every_steps=5",
    "evaluation.num_prompts=100",
    "evaluation.teacher_too=false",
)
ACTORS = ("rollout-0", "rollout-1", "teacher-countdown-0", "learner-0", "learner-1")
JOB_CLICKS = ("Task Timeline (beta)", "Cluster status and autoscaler", "Actor Table")
LINES = ('run="countdown"', *(f'pool="{pool}"' for pool in ("rollout", "teacher-countdown", "learner")))
GRAPH = {"tab": "0", "range_input": "3m"}
PRIVATE = (str(ROOT), sys.prefix, str(Path.home()), platform.node())
SHOWN = ("max by (run) (ray_preceptor_held_out_accuracy)", "max by (run, pool) (ray_preceptor_pool_busy_share)")


@dataclass(frozen=True)
class View:
    """A page, and what its text must say."""

    name: str  # of the picture
    url: str
    height: int  # points
    expected: Sequence[str]
    clicks: Sequence[str] = ()  # headings of what is to be opened, or closed


def views(door: Door, job_id: str, server: Prometheus) -> list[View]:
    """Return the pages that a run is seen on."""
    panels = [(f"g{place}.expr", query) for place, query in enumerate(SHOWN)]
    panels += [(f"g{place}.{name}", value) for place in range(len(SHOWN)) for name, value in GRAPH.items()]
    return [
        View("actors", f"{door.dashboard}/#/actors", 1000, [*ACTORS, "ALIVE"]),
        View("cluster", f"{door.dashboard}/#/cluster", 760, [HEAD, *NODES]),
        View("figures", f"{server.address}/graph?{urllib.parse.urlencode(panels)}", 1480, LINES),
        # Last: to show it, the dashboard starts an actor of its own.
        View("job", f"{door.dashboard}/#/jobs/{job_id}", 2200, [*ACTORS, "RUNNING", "Hide finished"], JOB_CLICKS),
    ]


def has_figures(server: Prometheus) -> bool:
    """Return whether a line of some length can be drawn of the run; says what Prometheus cannot read."""
    points = [value for _, value in server.query('count_over_time(ray_preceptor_step{run="countdown"}[1h])')]
    for sentence in server.silent_targets() if not points else []:
        print(sentence, flush=True)
    return max(points, default=0.0) >= POINTS


def photograph(page: Page, view: View, folder: Path) -> list[str]:
    """Open a page, wait until it says what is expected, and write its picture; return what is wrong, a line each."""
    page.resize(WIDTH, view.height, SCALE)
    page.open(view.url)
    for heading in view.clicks:
        press(page, heading)
    text = page.wait_for(lambda text: not lacking(view, text), PAGE_SECONDS)
    picture = folder / f"{view.name}.png"
    page.picture(picture)
    wrong = [f"{picture.name}: the page does not show {word}" for word in lacking(view, text)]
    wrong += [f"{picture.name}: the page shows {word}, which is this machine's own" for word in PRIVATE if word in text]
    if picture.stat().st_size > LARGEST_BYTES:
        wrong.append(f"{picture.name} has {picture.stat().st_size} bytes, more than {LARGEST_BYTES}")
    if wrong:
        sys.stderr.write(f"{view.url}\n{text}\n")
    return wrong


def press(page: Page, heading: str) -> None:
    """Open or close the part of a page under a heading."""
    page.wait_for(lambda text: heading in text, PAGE_SECONDS)
    page.click(heading)


def lacking(view: View, text: str) -> list[str]:
    """Return what a page's text ought to say and does not."""
    return [word for word in view.expected if word not in text]


def take_pictures(folder: Path) -> list[str]:
    """Start everything, photograph every page, and return what is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        cluster_of_hosts(NODES) as (door, hosts),
        running(door, hosts) as job_id,
        prometheus(hosts.seen_from_here(HEAD, hosts.local / "ray" / DISCOVERY)) as server,
        chromium() as page,
    ):
        wait_until(server.is_ready, START_SECONDS, "Prometheus answers")
        wait_until(lambda: has_figures(server), START_SECONDS, "Prometheus has figures of the run")
        page.set_cookie(door.dashboard, AUTHENTICATION_TOKEN_COOKIE_NAME, door.token_file.read_text())
        return [line for view in views(door, job_id, server) for line in photograph(page, view, folder)]


@contextmanager
def running(door: Door, hosts: Rack) -> Iterator[str]:
    """Submit the run, and yield its job's number when all of its actors are there."""
    with (hosts.folder / "output").open("w+") as output:
        process = submit(door, [f"run.directory={RUNS}", *RUN], output)
        try:
            wait_until(lambda: last_record(RUNS / "countdown").get("step", 0) > 0, START_SECONDS, "a step is done")
            [job] = [job for job in door.ask("/api/jobs/") if job["submission_id"]]
            yield job["job_id"]
        finally:
            process.terminate()
            process.wait()
            output.seek(0)
            sys.stderr.write(output.read())


def main() -> int:
    """Take the pictures; exit code 1 when a page lacks what it should show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.screenshots", description=__doc__)
    parser.add_argument("--folder", type=Path, default=IMAGES)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the program runs in its namespaces
    options = parser.parse_args()
    if not options.inside:
        isolated("benchmarks.cases.screenshots", ["--folder", str(options.folder.resolve()), "--inside"])
    wrong = take_pictures(options.folder)
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
