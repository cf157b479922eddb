"""The report in a real browser, where there is one: it needs nothing else, and hovering shows what was kept.

`python -m benchmarks.cases.report RUN` does the same with real runs.
"""

import shutil

import pytest

from benchmarks.cases.report import HOVER, compare_probabilities, open_report
from benchmarks.harness.browser import NAMES, chromium
from cluster.contracts.files import RecordsFile
from cluster.report.report import write_report
from cluster.run.evaluation import write_samples
from tests.cluster.report.support import keep, make_rows, make_run
from tests.cluster.report.test_report import HOSTILE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason=f"no browser: none of {', '.join(NAMES)} is on PATH"),
]


@pytest.fixture(scope="module")
def page():
    with chromium() as one:
        one.resize(1200, 900, 1)
        one.observe()
        yield one


def opened(page, *directories):
    report = write_report([directory.path for directory in directories])
    result = open_report(page, report)
    assert (result.errors, result.requests) == ([], [])
    return page.text()


def test_runs_in_every_state_open_and_say_what_is_missing(page, tmp_path):
    empty = make_run(tmp_path, name="empty", state="starting")
    failed = make_run(tmp_path, name="failed", steps=3, state="failed")
    running = make_run(tmp_path, name="running", steps=3, state="running")
    resumed = make_run(tmp_path, name="resumed", steps=5)
    RecordsFile(resumed.starts).write({"step": 2, "at": 1.1e9, "hardware": "2 nodes", "placement": {}})
    RecordsFile(resumed.alarms).write({"step": 4, "alarm": "overlap", "figure": "x", "value": 0.5, "limit": 0.7})
    for directory, sentence in (
        (empty, "so there are no curves"),
        (failed, "The run failed after step 3."),
        (running, "No tokens can be shown"),
        (resumed, "resumed 1 times"),
    ):
        assert sentence in opened(page, directory)
    marks = "[...document.querySelectorAll('#curve-charts .shapelayer path')].length"
    assert page.evaluate(marks) == 2 * page.evaluate("document.querySelectorAll('#curve-charts .chart').length")
    assert "resumed: training" in opened(page, resumed, failed)  # several runs have their names in the legends


@pytest.mark.parametrize(("objective", "top"), [("thinking-machines", "sampled"), ("tail-topk", None), ("gkd", "full")])
def test_hovering_shows_the_probabilities_that_were_kept(page, tmp_path, objective, top):
    directory = make_run(tmp_path, f"objective={objective}", steps=2)
    keep(directory, *(make_rows(step, [["p", "q", "a", "b", "c"]] * 2, top=top) for step in (1, 2)))
    opened(page, directory)
    compared, wrong = compare_probabilities(page, directory.path)
    assert wrong == []
    assert compared >= 4 * 3 * (2 + 3)  # rows x tokens x (the sampled one of both models, and others)


def test_hostile_texts_are_shown_and_do_nothing(page, tmp_path):
    directory = make_run(tmp_path, steps=1)
    keep(directory, make_rows(1, [["a", HOSTILE, HOSTILE, "z"]]))
    write_samples(directory.samples, 0, "student", [{"trajectory_id": 0, "prompt": HOSTILE, "completion": HOSTILE}])
    text = opened(page, directory)
    assert "alert(1)" in text
    assert page.evaluate("document.querySelectorAll('b:not(.mark)').length") == 0
    assert page.evaluate("document.querySelectorAll('#token-text .token').length") == 4
    assert page.evaluate(HOVER % 0)["tokens"]


def test_dark_and_printed_pages_have_other_colours(page, tmp_path):
    directory = make_run(tmp_path, steps=3)
    opened(page, directory)
    colours = []
    try:
        for scheme, medium in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
            page.prefer(scheme, medium)
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    finally:
        page.prefer("light")
    assert colours == ["rgb(255, 255, 255)", "rgb(22, 22, 26)", "rgb(255, 255, 255)"]


def test_the_arrow_keys_move_from_token_to_token(page, tmp_path):
    directory = make_run(tmp_path, steps=1)
    keep(directory, make_rows(1, [["p", "q", "a", "b"]]))
    opened(page, directory)
    for _ in range(3):
        key = "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})"
        page.evaluate(f"document.getElementById('token-text').dispatchEvent({key})")
    assert page.evaluate("document.querySelector('.token.now').textContent") == "a"
    assert 'token 2: "a"' in page.evaluate("document.getElementById('hover').innerText")
