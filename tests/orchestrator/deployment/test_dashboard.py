"""The dashboard and the monitoring stack: what they name exists, and everything that exists is named."""

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from orchestrator.commands.deployment import FILES, ROOT
from orchestrator.deployment.alerts import ALERTS, JOB
from orchestrator.deployment.dashboard import WIDTH, dashboard
from orchestrator.deployment.panels import LEFT_OUT, SECTIONS
from orchestrator.report.discovery import FOLDER
from orchestrator.report.metrics import METRICS, PREFIX

MONITORING = ROOT / "deploy" / "monitoring"
NAMES = {metric.name for metric in METRICS}


def queries() -> list[str]:
    drawn = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    return drawn + [alert.expression for alert in ALERTS]


@pytest.mark.parametrize("name", FILES)
def test_generated_files_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name](), "run python -m orchestrator.commands.deployment"


def test_every_metric_is_in_a_panel_or_named_as_left_out() -> None:
    drawn = {name for section in SECTIONS for panel in section.panels for name in panel.metrics}
    assert drawn | LEFT_OUT.keys() == NAMES
    assert not drawn & LEFT_OUT.keys()


def test_queries_name_metrics_of_ours_that_exist() -> None:
    named = {name for query in queries() for name in re.findall(rf"\b{PREFIX}(\w+)", query)}
    assert named
    assert named <= NAMES


def test_queries_name_metrics_of_ray_that_its_own_dashboard_names() -> None:
    import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as panels

    rays = set(re.findall(r"\bray_\w+", Path(panels.__file__).read_text(encoding="utf-8")))
    named = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert "ray_node_gpus_utilization" in named
    assert named <= rays


def test_panels_lie_beside_and_below_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken
        taken |= cells


def lost(given: object, kept: object, place: str = "") -> set[str]:
    """Fields that are not the same in both."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return {field for key in given for field in lost(given[key], kept.get(key), f"{place}/{key}")}
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return {field for a, b in zip(given, kept, strict=True) for field in lost(a, b, f"{place}[]")}
    return set() if given == kept else {place}


def test_grafanas_own_model_knows_every_field() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="no Grafana here: pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()

    def unknown(given: dict) -> set[str]:
        read = Dashboard.from_json(json.loads(json.dumps(given)))
        return lost(given, json.loads(JSONEncoder().encode(read)))

    # Of Prometheus' annotations, and of the editor: the model leaves them out.
    left_out = {f"/annotations/list[]/{name}" for name in ("step", "textFormat", "titleFormat")}
    left_out.add("/templating/list[]/definition")
    assert unknown(dashboard()) == left_out
    wrong = dashboard()
    wrong["panels"][1]["gridPoss"] = wrong["panels"][1].pop("gridPos")
    assert unknown(wrong) - left_out == {"/panels[]/gridPoss"}


def test_every_panel_says_what_it_shows_and_has_a_legend() -> None:
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert len({target["legendFormat"] for target in panel["targets"]}) == len(panel["targets"])


def test_alerts_have_a_remedy_and_names_of_their_own() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert.summary.endswith(".")
        assert alert.remedy.endswith(".")


def test_prometheus_looks_where_runs_announce_themselves() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["file_sd_configs"][0]["files"] for job in config["scrape_configs"]}
    assert jobs[JOB] == [f"../../runs/{FOLDER}/*.json"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert jobs["ray"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    assert config["rule_files"] == ["alerts.yml"]


def test_the_stack_is_what_compose_takes() -> None:
    validator = Draft7Validator(json.loads((ROOT / "tests" / "data" / "compose_schema.json").read_text()))
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    validator.validate(compose)
    compose["services"]["grafana"]["volume"] = compose["services"]["grafana"].pop("volumes")
    assert not validator.is_valid(compose)


def test_the_stack_mounts_what_its_configurations_name_and_listens_on_this_machine_only() -> None:
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    services = compose["services"]
    mounts = {name: [volume.split(":") for volume in service["volumes"]] for name, service in services.items()}
    folders = {inside: outside for outside, inside, *_ in mounts["grafana"]}
    providers = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/dashboards.yaml").read_text())
    for provider in providers["providers"]:
        path = provider["options"]["path"]
        assert any(path.startswith(folder) for folder in folders)
    assert (MONITORING / folders["/var/lib/grafana/dashboards/euphonium"] / "euphonium.json").is_file()
    # Relative to the configuration's place in the container, too, the runs are two folders up.
    assert any(":/euphonium/runs:ro" in volume for volume in services["prometheus"]["volumes"])
    assert any(volume == ".:/euphonium/deploy/monitoring:ro" for volume in services["prometheus"]["volumes"])
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    for service in services.values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://127.0.0.1:9090"


def test_the_page_on_operations_names_every_alert() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = {f"Euphonium{alert.name}" for alert in ALERTS}
    assert set(re.findall(r"`(Euphonium\w+)`", page)) == {name for name in names if not name.endswith("PoolShrunk")}
