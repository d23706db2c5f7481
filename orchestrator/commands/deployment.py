"""Generates the files for platforms: ``python -m orchestrator.commands.deployment``.

A test fails when they are not current.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from euphonium.config import RunConfig, load_config
from orchestrator.commands.render import manifest
from orchestrator.deployment.alerts import rules_yaml
from orchestrator.deployment.dashboard import dashboard_json
from orchestrator.deployment.jobs import runtime_environment
from orchestrator.deployment.node_groups import Machine, node_groups, train_command

ROOT = Path(__file__).parents[2]
# The recipe that the shipped cluster file is for.
RECIPE = "recipes/hunyuan-video/euphonium.yaml"


def cluster_file() -> str:
    """Text of ``ray_cluster.yaml``: what ``euphonium render RECIPE --to ray-up`` prints, the plan's memory apart."""
    config: RunConfig = load_config(ROOT / RECIPE)
    machine = Machine()
    groups = node_groups(config, machine, 0)
    return manifest(config, train_command(config, Path(RECIPE), [], groups), "ray-up", groups, machine)


def environment_file() -> str:
    """Text of ``deploy/runtime_env.yaml``."""
    note = "# For ray job submit --runtime-env; euphonium submit gives its jobs the same.\n"
    return note + yaml.safe_dump(runtime_environment())


FILES: dict[str, Callable[[], str]] = {
    "ray_cluster.yaml": cluster_file,
    "deploy/runtime_env.yaml": environment_file,
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
