"""Where Prometheus finds a run: a file for its ``file_sd_configs``, ``<output_dir>/.prometheus/<name>.json``.

A run that ends by itself, done or stopped on request, takes its file away. One that fails or is killed leaves it, and
so becomes a target that does not answer, for an alert, until it goes on or somebody removes the file.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from urllib.parse import urlsplit

from euphonium.config import RunConfig
from euphonium.files import written_aside

FOLDER = ".prometheus"


def discovery_file(config: RunConfig) -> Path:
    """The file of a run."""
    return config.output_dir / FOLDER / f"{config.name}.json"


def announce(config: RunConfig, address: str) -> None:
    """Names a run's endpoint to Prometheus.

    Args:
        config: the run's recipe.
        address: ``http://host:port/metrics``.
    """
    place = urlsplit(address)
    target = f"{_reachable(place.hostname or '')}:{place.port}"
    file = discovery_file(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        aside.write_text(json.dumps([{"targets": [target], "labels": {"run": config.name}}]) + "\n", encoding="utf-8")


def sign_off(config: RunConfig) -> None:
    """Says that the run has ended as it should."""
    discovery_file(config).unlink(missing_ok=True)


def _reachable(host: str) -> str:
    """The host by which others reach it: what listens everywhere is reached by the node's address."""
    import ray

    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    found = ray.util.get_node_ip_address() if everywhere else host
    return f"[{found}]" if ":" in found else found
