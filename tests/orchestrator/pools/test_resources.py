"""What is said of resources that are lacking."""

import time

from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo

from orchestrator.pools.resources import describe_autoscaler


def launch(count: int, details: str | None = None) -> LaunchRequest:
    status = LaunchRequest.Status.FAILED if details else LaunchRequest.Status.PENDING
    return LaunchRequest("p5.48xlarge", "rollout", count, status, int(time.time()), details=details)


def test_what_the_autoscaler_does_is_said_in_words() -> None:
    assert describe_autoscaler(ClusterStatus()) == "the autoscaler is starting no node"
    node = NodeInfo("g6.xlarge", "reward", "i-1", "10.0.0.7", failure_detail="no quota")
    busy = ClusterStatus(
        pending_launches=[launch(2), launch(1)], pending_nodes=[node], failed_launches=[launch(4, "no capacity")],
        failed_nodes=[node],
    )  # fmt: skip
    assert describe_autoscaler(busy) == (
        "the autoscaler is starting 1 x reward, 3 x rollout "
        "and failed to start rollout (no capacity), reward (no quota)"
    )
