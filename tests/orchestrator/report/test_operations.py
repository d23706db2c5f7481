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
from euphonium.wire.records import GroupTask
from orchestrator.report.metrics import find_metric
from orchestrator.report.operations import TERA, Operations

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


def test_without_the_wish_nothing_is_counted(make_config: MakeConfig) -> None:
    assert Operations(make_config()).rates([], NUMBERS, ranks=1) == {}
