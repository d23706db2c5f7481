"""A policy that leaves its device and comes back draws what it drew before, and takes weights as before."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from actors import sleeper
from actors.rollout import RolloutWorker
from actors.sleeper import Sleeper
from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.wire.records import GroupTask

CPU = torch.device("cpu")
TASK = GroupTask(group_id=5, prompt="a red car moving left on a white background", seed=11)
ALONE = ("rewards.process=null", "sampler.guidance=null")


class Network(nn.Module):
    """Tensors of several types, one of them used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 5, dtype=torch.bfloat16)
        self.second.bias = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.tied = self.first.weight
        self.register_buffer("table", torch.arange(7), persistent=False)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.parameters(), *self.buffers()]


def test_the_same_tensors_have_the_same_values_after_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleeper, "BUFFER_BYTES", 128)
    network = Network()
    before, values = network.tensors(), [tensor.detach().clone() for tensor in network.tensors()]
    places = [tensor.data_ptr() for tensor in before]
    sleeping = Sleeper(network, CPU)
    for _ in range(2):
        sleeping.sleep()
        assert sleeping.asleep
        assert all(tensor.data_ptr() not in places for tensor in network.tensors())
        sleeping.wake()
        assert not sleeping.asleep
    assert all(old is new for old, new in zip(before, network.tensors(), strict=True))
    assert all(torch.equal(old, new) for old, new in zip(values, network.tensors(), strict=True))
    assert network.tied is network.first.weight
    with torch.no_grad():
        network.first.weight.fill_(2.0)
    sleeping.sleep()
    assert torch.equal(network.first.weight, torch.full((5, 3), 2.0)), "what changed while it was awake goes along"


def test_a_worker_that_sleeps_between_groups_draws_the_same(make_config: Callable[..., RunConfig]) -> None:
    plain = RolloutWorker(make_config(*ALONE), CPU)
    drowsy = RolloutWorker(make_config(*ALONE), CPU, asleep=True)
    for seed in range(2):
        task = GroupTask(group_id=seed, prompt=TASK.prompt, seed=seed)
        weights = {name: tensor + 0.01 * seed for name, tensor in plain.published.items()}
        drawn = []
        for worker in (plain, drowsy):
            worker.wake()
            worker.load_weights(seed, weights.items())
            drawn.append(worker.generate(task, None)[1])
            worker.sleep()
        assert np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pools.rollout.sleep=true", "rollout.max_staleness=1"), "set it to 0, or sleep to false"),
        (("pools.rollout.sleep=true", "pools.learner.weight_transport=collective"), "take object_store"),
        (("pools.learner.num_gpus=0.6", "pools.learner.weight_transport=collective"), "take object_store"),
    ],
)
def test_what_does_not_go_with_sharing_is_refused(
    make_config: Callable[..., RunConfig], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)
