"""Manifests: what their platforms' own schemas and checkers say of them, and whether every pool has its place."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from euphonium.config import load_config
from euphonium.errors import ConfigError
from orchestrator.commands.cli import run_command
from orchestrator.deployment.jobs import STOP_WAIT_S
from orchestrator.deployment.node_groups import Machine, NodeGroup, node_groups, train_command
from orchestrator.deployment.pool_table import pool_table
from tests.checkout import ROOT
from tests.orchestrator.deployment.kuberay_schema import FILE, RECIPES, written

SHELLCHECK = os.environ.get("EUPHONIUM_SHELLCHECK") or shutil.which("shellcheck")
needs_shellcheck = pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck here: apt-get install shellcheck")


def groups_of(recipe: str, *overrides: str, machine: Machine | None = None) -> list[NodeGroup]:
    return node_groups(load_config(ROOT / recipe, overrides), machine or Machine(), 8)


def check(manifest: dict[str, Any]) -> None:
    schemas = json.loads(FILE.read_text())
    Draft202012Validator(schemas[manifest["kind"]]).validate(manifest)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_pool_has_room_where_its_command_puts_it(recipe: str) -> None:
    groups = groups_of(recipe)
    command = shlex.split(train_command(load_config(ROOT / recipe), ROOT / recipe, [], groups))
    assert command[:4] == ["python", "-m", "orchestrator", "train"]
    config = load_config(command[4], command[5:])
    assert config.output_dir == Path("/shared/runs")
    for row in pool_table(config):
        offers = [
            (group, {"CPU": group.cpus, "GPU": group.gpus, **{k: float(v) for k, v in group.resources.items()}})
            for group in groups
        ]
        room = {group.name: group.nodes * row.room_on(offer, group.labels) for group, offer in offers}
        assert sum(room.values()) >= row.members, (row.role, room)
        if len(groups) > 1:
            assert [name for name, members in room.items() if members] == [
                group.name for group in groups if row.role in group.roles
            ]


def test_pools_get_nodes_by_their_gpus() -> None:
    found = {group.name: group for group in groups_of(RECIPES[0])}
    assert {name: group.nodes for name, group in found.items()} == {"learner": 3, "rollout": 2, "reward": 1}
    assert found["reward"].gpus == 6
    assert found["learner"].resources == {"learner": 8}
    smaller = {group.name: group for group in groups_of(RECIPES[0], machine=Machine(gpus=4))}
    assert {name: group.nodes for name, group in smaller.items()} == {"learner": 6, "rollout": 3, "reward": 2}
    (shared,) = groups_of(RECIPES[1])
    assert (shared.nodes, shared.gpus) == (1, 8)
    (without,) = groups_of(RECIPES[2])
    assert without.gpus == 0


def test_what_a_recipe_asks_of_nodes_is_offered() -> None:
    overrides = ["pools.rollout.labels={zone: a}", "pools.rollout.resources={fast: 2}", "pools.prm.labels={zone: '!b'}"]
    found = {group.name: group for group in groups_of(RECIPES[0], *overrides)}
    assert found["rollout"].labels == {"pool": "rollout", "zone": "a"}
    assert found["rollout"].resources["fast"] == 10
    command = train_command(load_config(ROOT / RECIPES[0], overrides), Path("r"), overrides, list(found.values()))
    assert "pools.rollout.labels={pool" not in command
    with pytest.raises(ConfigError, match=r"pools\.prm\.labels: .* do not go with the other pools"):
        groups_of(RECIPES[0], "pools.prm.labels={zone: a}", "pools.orm.labels={zone: b}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cluster_launcher_takes_its_file(recipe: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load(written(recipe, "ray-up"))
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    for group in groups_of(recipe):
        node = prepared["available_node_types"][group.name]
        assert (node["min_workers"], node["labels"]) == (group.nodes, group.labels)
    cluster["available_node_types"][group.name]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("to", ["kuberay", "kuberay-cluster"])
def test_kuberays_schema_takes_its_manifests(recipe: str, to: Any) -> None:
    manifest = yaml.safe_load(written(recipe, to))
    check(manifest)
    spec = manifest["spec"]["rayClusterSpec"] if to == "kuberay" else manifest["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["runAsNonRoot"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    if to == "kuberay":
        assert manifest["spec"]["backoffLimit"] > 0, "each retry goes on from the newest checkpoint"
        environment = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])
        assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}


def test_prometheus_operator_finds_the_pods_and_their_ports() -> None:
    monitor = yaml.safe_load((ROOT / "deploy" / "monitoring" / "pod-monitor.yaml").read_text())["spec"]
    spec = yaml.safe_load(written(RECIPES[0], "kuberay-cluster"))["spec"]
    found: dict[str, set[str]] = {}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]
        assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        found[group.get("groupName", "head")] = ports
    wanted = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert wanted <= found["head"]
    assert all("metrics" in ports for ports in found.values())


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"], 1),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"], "two"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "tokens"),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volume"], []),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "port"], 1),
        (["spec", "submissionMode"], 1),
        (["spec", "backOffLimit"], 3),
    ],
)
def test_kuberays_schema_would_notice_a_typo(path: list[Any], wrong: Any) -> None:
    manifest = yaml.safe_load(written(RECIPES[0], "kuberay"))
    place = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = wrong
    with pytest.raises(ValidationError):
        check(manifest)


def checked_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    assert SHELLCHECK is not None
    (folder / "run.sbatch").write_text(script)
    return subprocess.run([SHELLCHECK, "--shell=bash", "run.sbatch"], cwd=folder, text=True, capture_output=True)


def node_part(script: str) -> str:
    """What every node runs; for the checker of the script it is only a text."""
    return re.search(r"<<'NODE'\n(.*?)^NODE$", script, re.S | re.M)[1]  # type: ignore[index]


@needs_shellcheck
@pytest.mark.parametrize("recipe", RECIPES)
def test_shellcheck_has_nothing_to_say_about_batch_scripts(recipe: str, tmp_path: Path) -> None:
    script = written(recipe, "slurm", "prompts.train=it's.txt")
    done = checked_script(script, tmp_path)
    assert done.returncode == 0, done.stdout
    variables = "SLURM_NODEID=0 ADDRESS=a NODES=1\n"
    done = checked_script(f"#!/bin/bash\n{variables}{node_part(script)}", tmp_path)
    # The variable in single quotes is for the inner shell.
    assert set(re.findall(r"SC\d+", done.stdout)) <= {"SC2016"}, done.stdout


@needs_shellcheck
def test_shellcheck_would_notice_a_typo(tmp_path: Path) -> None:
    script = written(RECIPES[0], "slurm")
    assert checked_script(script.replace('rm -rf "$state"', "rm -rf $stat"), tmp_path).returncode != 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_batch_scripts_ask_for_the_nodes_of_the_table(recipe: str) -> None:
    script, groups = written(recipe, "slurm"), groups_of(recipe)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    nodes = sum(group.nodes for group in groups)
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert f"#SBATCH --signal=B:TERM@{STOP_WAIT_S}\n" in script
    for number in range(nodes):
        choice = node_part(script).split("exec ray")[0] + 'echo "$labels;$resources"'
        said = subprocess.run(["bash", "-c", choice], env={"SLURM_NODEID": str(number)}, text=True, check=True,
                              capture_output=True).stdout.strip()  # fmt: skip
        labels, _, resources = said.partition(";")
        group = [group for group in groups for _ in range(group.nodes)][number]
        assert labels == f"pool={group.name}"
        assert json.loads(resources) == group.resources


def test_the_command_renders_what_fits_and_refuses_what_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / RECIPES[2])
    assert run_command(["render", recipe, "--to", "kuberay"]) == 0
    check(yaml.safe_load(capfd.readouterr().out))
    assert run_command(["render", recipe, "--to", "slurm", "--host", "1"]) == 2
    assert "does not fit these nodes" in capfd.readouterr().err
    assert run_command(["render", recipe, "--to", "nomad"]) == 2
