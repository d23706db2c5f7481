"""Rates of the networks, against the operations of a real pass."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.wire.records import GroupInfo, GroupTask
from orchestrator.report.metrics import find_metric
from orchestrator.report.operations import TERA, Operations, gpu_types

MakeConfig = Callable[..., RunConfig]
LONG = " ".join(["a red car moving left on a white background"] * 3)
NUMBERS = {"time/update_s": 4.0, "policy/transitions": 10.0}


def test_rates_are_operations_over_the_seconds_that_were_reported(make_config: MakeConfig) -> None:
    config = make_config(
        "profile.operations=true", "sampler.guidance=null", "rewards.process=null", "advantage.mode=outcome"
    )
    worker = RolloutWorker(config, torch.device("cpu"))
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        info, _, _ = worker.generate(GroupTask(group_id=0, prompt=LONG, seed=4), None)
    info = dataclasses.replace(info, seconds={"total": 2.0})
    operations = Operations(config)
    deadline = time.monotonic() + 60
    while not (rates := operations.rates([info, info], NUMBERS, ranks=2)) and time.monotonic() < deadline:
        time.sleep(0.1)
    # The plan counts prompts of the greatest length.
    assert rates["achieved/rollout_tflops"] * TERA == pytest.approx(counter.get_total_flops() / 2.0, rel=0.05)
    assert rates["achieved/learner_tflops"] > 0
    half = operations.rates([info, info], NUMBERS | {"policy/transitions": 5.0}, ranks=1)
    np.testing.assert_allclose(half["achieved/learner_tflops"], rates["achieved/learner_tflops"])
    for name in rates:
        assert find_metric(name)


@pytest.mark.parametrize(
    ("types", "dtype", "gpus", "shares"),
    [
        ({"H100"}, "bfloat16", 1, {"rollout": 0.1, "learner": 0.2}),
        ({"A100"}, "bfloat16", 1, {"rollout": 0.1 * 989 / 312, "learner": 0.2 * 989 / 312}),
        ({"H100"}, "bfloat16", 0, {"learner": 0.2}),
        ({"H100"}, "float32", 1, {}),
        ({"H100", "A100"}, "bfloat16", 1, {}),
        ({"A card of tomorrow"}, "bfloat16", 1, {}),
        (set(), "bfloat16", 1, {}),
    ],
)
def test_a_share_of_the_peak_is_of_one_known_kind_of_gpu(
    make_config: MakeConfig, types: set[str], dtype: str, gpus: int, shares: dict[str, float]
) -> None:
    config = make_config(f"model.dtype={dtype}", f"pools.rollout.num_gpus={gpus}", "pools.learner.num_gpus=1")
    operations = Operations(config, lambda: set(types))
    operations._counted = {"group": 989e12 * 0.1, "transition": 989e12 * 0.2}
    info = GroupInfo(
        task=GroupTask(group_id=0, prompt="a", seed=0), policy_version=0, fingerprint="",
        rows=np.zeros((1, 1), dtype=np.int64), process_rewards=None, seconds={"total": 1.0}, payload_bytes=0,
    )  # fmt: skip
    rates = operations.rates([info], {"time/update_s": 1.0, "policy/transitions": 2.0}, ranks=2)
    found = {name.removeprefix("achieved/").removesuffix("_mfu"): v for name, v in rates.items() if "mfu" in name}
    assert found == pytest.approx(shares)
    for name in rates:
        assert find_metric(name)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_gpus_has_no_kind_of_them() -> None:
    assert gpu_types() == set()


def test_without_the_wish_nothing_is_counted(make_config: MakeConfig) -> None:
    assert Operations(make_config()).rates([], NUMBERS, ranks=1) == {}
