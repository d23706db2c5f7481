"""Generates the files for platforms: ``python -m orchestrator.commands.deployment``.

A test fails when they are not current.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.deployment.alerts import rules_yaml
from orchestrator.deployment.dashboard import dashboard_json

ROOT = Path(__file__).parents[2]
FILES: dict[str, Callable[[], str]] = {
    "deploy/monitoring/alerts.yml": rules_yaml,
    "deploy/monitoring/grafana/dashboards/euphonium.json": dashboard_json,
}


def main() -> None:
    """Writes the files."""
    for name, text in FILES.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
