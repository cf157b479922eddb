"""The table of metrics, and what is made from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.grafana import DASHBOARD, dashboard, dashboard_text, exported_name, markdown_table, queries
from cluster.monitoring.metric_table import all_metrics, panels

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
PLACES = [panel["gridPos"] for panel in dashboard()["panels"]]


def test_the_dashboards_file_is_made_from_the_table() -> None:
    assert DASHBOARD.read_text() == dashboard_text(), "run python -m benchmarks.harness.grafana"


def test_the_documented_table_is_the_one_in_the_code() -> None:
    assert markdown_table() in DOCS.read_text()


def test_every_metric_has_one_name_and_every_line_of_a_panel_its_own_legend() -> None:
    names = [metric.name for metric in all_metrics()]
    assert len(set(names)) == len(names)
    for panel in panels():
        legends = [legend for metric in panel.metrics for legend in queries(metric)]
        assert len(set(legends)) == len(legends)


def test_every_metric_has_a_panel_that_asks_for_it_and_for_the_selected_runs_only() -> None:
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    for metric in all_metrics():
        suffix = "_bucket" if metric.kind == "histogram" else ""
        own = [query for query in asked if f"({exported_name(metric)}{suffix}{{" in query]
        assert len(own) == (3 if metric.kind == "histogram" else 1)
        assert all('{run=~"$run"}' in query for query in own)


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("preceptor_kl", 'max by (run) (ray_preceptor_kl{run=~"$run"})'),
        ("preceptor_pool_serving", 'max by (run, pool) (ray_preceptor_pool_serving{run=~"$run"})'),
        ("preceptor_steps", 'sum by (run) (rate(ray_preceptor_steps_total{run=~"$run"}[$__rate_interval]))'),
    ],
)
def test_a_query_follows_from_the_metrics_kind(name: str, query: str) -> None:
    [metric] = [metric for metric in all_metrics() if metric.name == name]
    assert list(queries(metric).values()) == [query]


def test_datasource_and_runs_are_chosen_in_grafana() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["query"]["query"] == "label_values(ray_preceptor_step, run)"
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_no_panel_covers_another() -> None:
    cells = [cell for place in PLACES for cell in covered(place)]
    assert len(set(cells)) == len(cells)
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def covered(place: dict[str, Any]) -> list[tuple[int, int]]:
    return [
        (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
    ]


def test_the_file_is_json_that_names_its_own_dashboard() -> None:
    assert json.loads(DASHBOARD.read_text())["uid"] == "preceptorDashboard"
