from pathlib import Path

import pytest
import yaml

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
