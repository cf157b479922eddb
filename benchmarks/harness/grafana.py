"""Makes the Grafana dashboard and the table in docs/metrics.md from the table of metrics.

`python -m benchmarks.harness.grafana` writes the dashboard's file and prints the table.
"""

import json
import sys
from pathlib import Path
from typing import Any

from cluster.monitoring.metric_table import Metric, Panel, panels

DASHBOARD = Path(__file__).parents[2] / "cluster" / "monitoring" / "dashboards" / "preceptor.json"
UID = "preceptorDashboard"  # as Ray's own dashboards: rayDefaultDashboard, rayDataDashboard, ...
PANELS_PER_ROW, PANEL_HEIGHT, GRID_WIDTH = 2, 8, 24  # as Ray lays its panels out
QUANTILES = (0.5, 0.95, 0.99)
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SELECTED = 'run=~"$run"'


def dashboard() -> dict[str, Any]:
    """Return the dashboard, as Grafana imports it."""
    return {
        "uid": UID,
        "title": "Preceptor",
        "tags": ["ray", "preceptor"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,  # one crosshair for all panels
        "templating": {"list": _variables()},
        "panels": _rows(),
    }


def exported_name(metric: Metric) -> str:
    """Return a metric's name in Prometheus.

    Example:
        >>> exported_name(Metric("preceptor_steps", "every step", "steps", "counter"))
        'ray_preceptor_steps_total'
    """
    return f"ray_{metric.name}" + ("_total" if metric.kind == "counter" else "")


def queries(metric: Metric) -> dict[str, str]:
    """Return the legend of each of a metric's lines, and its query."""
    name = exported_name(metric)
    if metric.kind == "counter":
        return {"{{run}}": f"sum by (run) (rate({name}{{{_SELECTED}}}[$__rate_interval]))"}
    if metric.kind == "histogram":
        rates = f"sum by (run, le) (rate({name}_bucket{{{_SELECTED}}}[$__rate_interval]))"
        return {
            f"p{quantile * 100:.0f} {{{{run}}}}": f"histogram_quantile({quantile}, {rates})" for quantile in QUANTILES
        }
    by, legend = ("run, pool", "{{pool}} ") if metric.is_per_pool else ("run", "")
    # One driver sets a metric, but on another node, after a restart, it is another series until the old one goes stale.
    return {f"{_short(metric)} {legend}{{{{run}}}}": f"max by ({by}) ({name}{{{_SELECTED}}})"}


def markdown_table() -> str:
    """Return the table of all metrics for docs/metrics.md."""
    lines = ["| metric | kind | name in metrics.jsonl | meaning |", "|---|---|---|---|"]
    for panel in panels():
        for metric in panel.metrics:
            source = metric.source if " " in metric.source else f"`{metric.source}`"
            lines.append(f"| `{exported_name(metric)}` | {metric.kind} | {source} | {metric.description} |")
    return "\n".join(lines) + "\n"


def _short(metric: Metric) -> str:
    return metric.name.removeprefix("preceptor_").removeprefix("pool_").replace("_", " ")


def _variables() -> list[dict[str, Any]]:
    steps = "ray_preceptor_step"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0},
        {
            "name": "run",
            "type": "query",
            "label": "run",
            "datasource": _DATASOURCE,
            "definition": f"label_values({steps}, run)",
            "query": {"query": f"label_values({steps}, run)", "refId": "run"},
            "refresh": 2,  # when the time range changes
            "sort": 2,  # by name, the last first
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"text": ["All"], "value": ["$__all"], "selected": True},
        },
    ]


def _rows() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    top = 0
    for row in dict.fromkeys(panel.row for panel in panels()):
        place = {"x": 0, "y": top, "w": GRID_WIDTH, "h": 1}
        shown.append({"id": len(shown) + 1, "type": "row", "title": row, "gridPos": place, "collapsed": False})
        own = [panel for panel in panels() if panel.row == row]
        shown += [_panel(panel, len(shown) + 1 + index, index, top + 1) for index, panel in enumerate(own)]
        top += 1 + PANEL_HEIGHT * -(-len(own) // PANELS_PER_ROW)
    return shown


def _panel(panel: Panel, number: int, index: int, top: int) -> dict[str, Any]:
    width = GRID_WIDTH // PANELS_PER_ROW
    lines = [line for metric in panel.metrics for line in queries(metric).items()]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": "\n".join(f"{_short(metric)}: {metric.description}" for metric in panel.metrics),
        "datasource": _DATASOURCE,
        "gridPos": {
            "x": width * (index % PANELS_PER_ROW),
            "y": top + PANEL_HEIGHT * (index // PANELS_PER_ROW),
            "w": width,
            "h": PANEL_HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"fillOpacity": 5}}, "overrides": []},
        "options": {"legend": {"displayMode": "table", "calcs": ["lastNotNull", "mean"]}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _DATASOURCE, "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(lines)
        ],
    }


def dashboard_text() -> str:
    """Return the dashboard as the text of its file."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard_text(), encoding="utf-8")
    sys.stdout.write(markdown_table())
