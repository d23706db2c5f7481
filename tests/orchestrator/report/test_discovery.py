import json
import socket
from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from orchestrator.report.discovery import announce, discovery_file, sign_off
from orchestrator.report.tracking import Tracker


def targets(config: RunConfig) -> list[dict]:
    return json.loads(discovery_file(config).read_text())


def test_a_run_names_its_endpoint_until_it_signs_off(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("metrics.tensorboard=false")
    config.run_dir.mkdir(parents=True)
    tracker = Tracker(config, 0)
    assert tracker.endpoint is not None
    host, port = tracker.endpoint.address.removeprefix("http://").removesuffix("/metrics").split(":")
    assert targets(config) == [{"targets": [f"{host}:{port}"], "labels": {"run": "tiny"}}]
    tracker.close()
    # A run that fails closes everything as well: its target stays, and no longer answers.
    assert discovery_file(config).exists()
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port)), timeout=5):
        pass
    sign_off(config)
    assert not discovery_file(config).exists()
    sign_off(config)


def test_an_endpoint_on_all_addresses_is_reached_by_the_nodes(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    for everywhere in ("0.0.0.0", "[::]"):
        announce(config, f"http://{everywhere}:9100/metrics")
        ((target,),) = [entry["targets"] for entry in targets(config)]
        host, _, port = target.rpartition(":")
        assert port == "9100"
        assert host not in ("0.0.0.0", "[::]")
    announce(config, "http://10.1.2.3:9100/metrics")
    assert targets(config)[0]["targets"] == ["10.1.2.3:9100"]
