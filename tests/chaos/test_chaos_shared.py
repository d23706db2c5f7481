"""Roles that share GPUs die: their places are kept for them, and the run has the numbers of an unbroken one."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.test_chaos import BOUND_S, wait_until
from tests.test_shared_gpus import SHARED

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def two_gpus() -> Iterator[str]:
    """Address of a cluster of one node that counts two GPUs, which are none."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.parametrize(
    ("titles", "happens"),
    [(("RolloutActor", "rollout-"), "is lost"), (("RayTrainWorker",), "going on from iteration")],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_role_that_shares_its_gpu_is_killed(
    start: Callable,
    recipe: Callable[..., Path],
    same_numbers: Callable,
    two_gpus: str,
    titles: tuple[str, ...],
    happens: str,
) -> None:
    job = start(str(recipe(*SHARED, "rewards.deadline_s=60")), address=two_gpus)
    job.wait_for("iteration 3/6")
    victim = job.one(*titles)
    wait_until(victim, "busy")
    victim.kill()
    killed = time.monotonic()
    job.wait_for(happens)
    assert job.finish() == 0, job.output
    assert time.monotonic() - killed < BOUND_S
    same_numbers()
