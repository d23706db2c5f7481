"""The loops of published trainers do the work of ours: the same samples, rewards and weights."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.baselines.loop import Practice, PublishedLoop
from benchmarks.single_process import SingleProcess
from euphonium.config import RunConfig

RECIPES = {
    "flow-grpo": (
        Practice(name="flow-grpo", recipe="", source="", leaves_out_zeros=True),
        (
            "sampler.law=flow_grpo", "sampler.shared_noise=false", "advantage.scope=global",
            "objective.kl={anchor: fixed}",
        ),
    ),
    "dancegrpo": (
        Practice(name="dancegrpo", recipe="", source="", batch=1, scored_alone=True),
        ("objective.timestep_fraction=0.6", "objective.updates_per_iteration=2"),
    ),
    "mixgrpo": (
        Practice(name="mixgrpo", recipe="", source="", batch=1, scored_alone=True),
        ("sampler.law=flow_grpo", "sampler.sde_window={kind: sliding, size: 2, allowed: [1, 4]}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_loop_makes_the_updates_of_ours(make_config: Callable[..., RunConfig], name: str) -> None:
    practice, overrides = RECIPES[name]
    config = make_config(
        "sampler.guidance=null", "rewards.process=null", "advantage.mode=outcome", "optimizer.learning_rate=1e-3",
        "optimizer.eps=1e-3", "objective.clip_range=0.5", *overrides,
    )  # fmt: skip
    theirs, ours = PublishedLoop(config, practice), SingleProcess(config)
    for _ in range(2):
        one, other = theirs.iterate(), ours.iterate()
        assert one["policy/grad_norm"] == pytest.approx(other["policy/grad_norm"], rel=1e-3)
    for mine, his in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(his, mine, rtol=1e-4, atol=1e-5)
