"""The Grafana dashboard of runs, as JSON for Grafana 10 and later, made from the panels and the declared metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from orchestrator.deployment.panels import SECTIONS, Panel
from orchestrator.report.metrics import METRICS, PREFIX

WIDTH = 24
HEIGHTS = {"timeseries": 8, "stat": 4}
WIDTHS = {"timeseries": 12, "stat": 6}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DECLARED = {metric.name: metric for metric in METRICS}


def dashboard_json() -> str:
    """Text of ``deploy/monitoring/grafana/dashboards/euphonium.json``."""
    return json.dumps(dashboard(), indent=2) + "\n"


def dashboard() -> dict[str, Any]:
    """The dashboard by Grafana's fields."""
    return {
        "uid": "euphonium-runs",
        "title": "euphonium",
        "description": "Made by python -m orchestrator.commands.deployment; do not edit.",
        "tags": ["euphonium"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_alerts()]},
        "templating": {"list": _variables()},
        "links": [],
        "panels": list(_placed()),
    }


def _variables() -> list[dict[str, Any]]:
    runs = f"label_values({PREFIX}iteration, run)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": SOURCE,
            "definition": runs,
            "query": {"query": runs, "refId": "runs"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "enable": True,
        "datasource": SOURCE,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Euphonium.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{run}}{{instance}} {{reward}}",
        "step": "60s",
    }


def _placed() -> Iterator[dict[str, Any]]:
    """Headings and panels from top to bottom, as many side by side as fit."""
    number, top = 0, 0
    for section in SECTIONS:
        number += 1
        yield {
            "id": number, "type": "row", "title": section.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
        }  # fmt: skip
        top += 1
        left = height = 0
        for panel in section.panels:
            if left + WIDTHS[panel.kind] > WIDTH:
                top, left = top + height, 0
            number += 1
            height = HEIGHTS[panel.kind]
            yield _drawn(panel, number, {"x": left, "y": top, "w": WIDTHS[panel.kind], "h": height})
            left += WIDTHS[panel.kind]
        top += height


def _drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"showPoints": "auto", "spanNulls": True, "lineWidth": 1}
    if panel.stacked:
        custom |= {"stacking": {"mode": "normal"}, "fillOpacity": 30}
    if panel.logarithmic:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        defaults["custom"] = custom
        options: dict[str, Any] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name", "colorMode": "none"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": _description(panel),
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for n, (legend, query) in enumerate(_queries(panel))
        ],
    }


def _queries(panel: Panel) -> Iterator[tuple[str, str]]:
    """Legend and query of every series of a panel."""
    for name in panel.metrics:
        legend = "{{run}}" + (" {{reward}}" if "*" in _DECLARED[name].key else "")
        if len(panel.metrics) > 1:
            legend += " " + name.removesuffix("_seconds").replace("_", " ")
        # Grafana reckons in milliseconds.
        scale = " * 1000" if panel.unit == "dateTimeFromNow" else ""
        yield legend, f'{PREFIX}{name}{{run=~"$run"}}{scale}'
    yield from panel.cluster


def _description(panel: Panel) -> str:
    if not panel.metrics:
        return "Of Ray's nodes."
    if len(panel.metrics) == 1:
        return _DECLARED[panel.metrics[0]].help
    return "\n\n".join(f"{name.replace('_', ' ')}: {_DECLARED[name].help}" for name in panel.metrics)
