"""The schema that manifests for KubeRay are checked against, cut out of KubeRay's own definitions.

``python -m tests.orchestrator.deployment.kuberay_schema FOLDER`` makes ``tests/data/kuberay_schema.json`` anew from
``helm-chart/kuberay-operator/crds`` of a checkout of KubeRay (Apache-2.0). Kept are the names of all fields wherever a
manifest of ours goes, and the types of those that it uses; texts, and what lies below fields that it does not use, are
left out.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.commands.render import Target, manifest
from orchestrator.deployment.node_groups import Machine, node_groups, train_command
from tests.checkout import ROOT

FILE = ROOT / "tests" / "data" / "kuberay_schema.json"
KINDS = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
# Pools of their own, pools that share GPUs, and pools without GPUs.
RECIPES = ("recipes/hunyuan-video/euphonium.yaml", "recipes/flux/one-node.yaml", "recipes/embedded/euphonium-sage.yaml")
KEPT = ("type", "items", "properties", "required", "enum", "additionalProperties", "pattern", "minimum", "maximum")


def written(recipe: str, to: Target, *overrides: str) -> str:
    """A manifest of a shipped recipe, on nodes of eight GPUs, which sharing pools fill."""
    from euphonium.config import load_config

    config = load_config(ROOT / recipe, overrides)
    machine = Machine()
    groups = node_groups(config, machine, 8)
    return manifest(config, train_command(config, Path(recipe), overrides, groups), to, groups, machine)


def manifests() -> Iterator[dict[str, Any]]:
    for recipe in RECIPES:
        for to in ("kuberay", "kuberay-cluster"):
            yield yaml.safe_load(written(recipe, to, "pools.prm.resources={extra: 1}"))


def cut(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a schema that says something about values; objects take no other fields than it names."""
    found = {key: value for key, value in schema.items() if key in KEPT and key not in ("items", "properties")}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        inside = {name: [value[name] for value in values if name in value] for name in schema["properties"]}
        found["properties"] = {
            name: cut(inner, inside[name]) if inside[name] else {} for name, inner in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        below = [inner for value in values for inner in value.values()]
        found["additionalProperties"] = cut(schema["additionalProperties"], below)
    if "items" in schema:
        found["items"] = cut(schema["items"], [inner for value in values for inner in value])
    return found


def main(folder: Path) -> None:
    commit = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    schemas = {}
    for kind, file in KINDS.items():
        text = subprocess.run(
            ["git", "-C", str(folder), "show", f"HEAD:helm-chart/kuberay-operator/crds/{file}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        (version,) = [v for v in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if v["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schemas[kind] = cut(schema, [value for value in manifests() if value["kind"] == kind])
        # The definition leaves it open; Kubernetes checks it itself.
        schemas[kind]["properties"]["metadata"] = {"type": "object"}
    notice = (
        f"Cut out of ray-project/kuberay at {commit}, Apache-2.0; see tests/orchestrator/deployment/kuberay_schema.py"
    )
    FILE.write_text(json.dumps({"$comment": notice, **schemas}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
