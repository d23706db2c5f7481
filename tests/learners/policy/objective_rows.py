"""Rows, velocities and settings that the tests of the objective share."""

from __future__ import annotations

import torch
from torch import Tensor

from euphonium.config import KlConfig, ObjectiveConfig
from euphonium.dynamics import Guidance, StepTable, shifted_sigmas
from learners.policy.objective import Transitions, Velocity

OPTIONS = {
    "equaliser": ObjectiveConfig(step_weights="equaliser", clip_range=10.0),
    "inverse_delta": ObjectiveConfig(step_weights="inverse_delta", clip_range=10.0),
    "anchor": ObjectiveConfig(clip_range=10.0, kl=KlConfig(anchor="moving", anchor_weight=2.0)),
    "log_ratio": ObjectiveConfig(clip_range=10.0, kl=KlConfig(previous="log_ratio", previous_weight=3.0)),
    "k3": ObjectiveConfig(clip_range=10.0, kl=KlConfig(previous="k3", previous_weight=3.0)),
    "gaussian": ObjectiveConfig(clip_range=10.0, kl=KlConfig(previous="gaussian")),
    "dual": ObjectiveConfig(clip_range=10.0, kl=KlConfig(anchor="moving", previous="k3")),
    "guard": ObjectiveConfig(clip_range=10.0, ratio_normalisation=True),
    "everything": ObjectiveConfig(
        clip_range=10.0, ratio_normalisation=True, step_weights="equaliser",
        kl=KlConfig(anchor="fixed", previous="gaussian"),
    ),
}  # fmt: skip


def table(guidance: Guidance | None = None) -> StepTable:
    return StepTable.build("dance", shifted_sigmas(8, 3.0), eta=0.6, guidance=guidance)


def rows(guidance: Guidance | None, *, keep_gradient: bool, v_old: Tensor, generator: torch.Generator) -> tuple:
    t = table(guidance)
    steps = torch.tensor([2, 3, 4, 5])
    x, g, z = (torch.randn(4, 3, 2, generator=generator) for _ in range(3))
    mean_guided = t.mean(steps, x, v_old, g)
    x_next = mean_guided + t.std[steps].float().view(-1, 1, 1) * z
    scored = t.mean(steps, x, v_old, g if keep_gradient else None)
    transitions = Transitions(
        states=x, next_states=x_next, steps=steps, log_probs=t.log_prob(steps, x_next, scored),
        advantages=torch.tensor([[1.0, -0.5, 0.7, 2.0]]), gradients=g if keep_gradient else None, conditioning={},
        weight=0.25,
    )  # fmt: skip
    return t, transitions, g, z


def constant(v: Tensor) -> Velocity:
    return lambda x, time, conditioning: v
