"""The objective against the papers' equations, written out again in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from euphonium.config import KlConfig, ObjectiveConfig
from euphonium.dynamics import Guidance, StepTable
from learners.policy.objective import References, Transitions, evaluate_objective
from tests.learners.policy.objective_rows import OPTIONS, constant, rows


def published_objective(
    config: ObjectiveConfig, t: StepTable, rows: Transitions, v: Tensor, v_old: Tensor, anchor: Tensor, kl_weight: float
) -> float:
    """The objective in float64, from the equations alone; velocities ``[rows, ...]``.

    Euphonium Eq. 17-19 and 53, SAGE-GRPO Eq. 9 and 13-15 with the KL as a penalty, GRPO-Guard's normalised ratio.
    """
    loss = 0.0
    stochastic = [j for j in range(t.num_steps) if float(t.std[j]) > 0]
    norms = sorted(abs(float(t.coef_v[j])) / float(t.std[j]) for j in stochastic)
    lengths = {j: float(t.sigmas[j] - t.sigmas[j + 1]) for j in stochastic}
    for i, k in enumerate(rows.steps.tolist()):
        x, x_next = rows.states[i].double(), rows.next_states[i].double()
        std = float(t.std[k])

        def mean(velocity: Tensor, i: int = i, k: int = k, x: Tensor = x) -> Tensor:
            unguided = float(t.coef_x[k]) * x + float(t.coef_v[k]) * velocity[i].double()
            return unguided if rows.gradients is None else unguided + float(t.coef_grad[k]) * rows.gradients[i].double()

        def divergence(other: Tensor, i: int = i, std: float = std) -> float:
            return float((mean(v) - mean(other)).square().mean()) / (2 * std**2)

        residual = float((x_next - mean(v)).square().mean())
        log_prob = -residual / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        log_ratio = log_prob - float(rows.log_probs[i])
        if config.ratio_normalisation:
            ratio = math.exp(std * (log_ratio + divergence(v_old)))
        else:
            ratio = math.exp(log_ratio)
        held = min(max(ratio, 1 - config.clip_range), 1 + config.clip_range)
        row = -sum(min(ratio * a, held * a) for a in rows.advantages[:, i].tolist())
        if config.step_weights == "equaliser":
            row *= norms[(len(norms) - 1) // 2] / (abs(float(t.coef_v[k])) / std)
        elif config.step_weights == "inverse_delta":
            row *= (1 / lengths[k]) / (sum(1 / d for d in lengths.values()) / len(lengths))
        if config.kl is not None:
            penalty = config.kl.anchor_weight * divergence(anchor) if config.kl.anchor != "none" else 0.0
            penalty += (
                config.kl.previous_weight
                * {
                    "none": 0.0,
                    "log_ratio": -log_ratio,
                    "k3": math.exp(log_ratio) - 1 - log_ratio,
                    "gaussian": divergence(v_old),
                }[config.kl.previous]
            )
            row += kl_weight * penalty
        loss += rows.weight * row
    return loss


PUBLISHED = OPTIONS | {
    "plain": ObjectiveConfig(clip_range=10.0),
    "clipped": ObjectiveConfig(clip_range=1e-3),
    "clipped, all options": ObjectiveConfig(
        clip_range=1e-3,
        ratio_normalisation=True,
        step_weights="inverse_delta",
        kl=KlConfig(anchor="fixed", previous="k3"),
    ),
}


@pytest.mark.parametrize("guidance", ["none", "distill", "standard"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_value_and_gradient_are_those_of_the_equations(name: str, guidance: str) -> None:
    """Against central differences in float64, coordinate by coordinate, of the equations written out again."""
    kind = "distill" if guidance == "none" else guidance
    config = PUBLISHED[name].model_copy(update={"kind": kind})
    generator = torch.Generator().manual_seed(11)
    v_old = torch.randn(4, 3, 2, generator=generator)
    t, single, _, _ = rows(
        Guidance(scale=0.5) if guidance != "none" else None,
        keep_gradient=guidance == "standard", v_old=v_old, generator=generator,
    )  # fmt: skip
    transitions = dataclasses.replace(
        single, advantages=torch.cat([single.advantages, torch.tensor([[-0.6, 0.1, 1.5, -0.3]])])
    )
    v = v_old + 0.05 * torch.randn(v_old.shape, generator=generator)
    anchor = v_old + 0.1 * torch.randn(v_old.shape, generator=generator)
    leaf = v.clone().requires_grad_(True)
    references = References(
        anchor=constant(anchor) if config.kl is not None and config.kl.anchor != "none" else None,
        previous=constant(v_old), kl_weight=0.7,
    )  # fmt: skip
    value = evaluate_objective(config, t, constant(leaf), transitions, references)
    value.loss.backward()
    assert leaf.grad is not None
    if name.startswith("clipped"):
        assert 0 < float(value.clipped.mean()) < 1

    def loss(at: Tensor) -> float:
        return published_objective(config, t, transitions, at, v_old, anchor, 0.7)

    assert float(value.loss.detach()) == pytest.approx(loss(v.double()), rel=1e-5, abs=1e-6)
    numeric = torch.zeros_like(v, dtype=torch.float64)
    step = 1e-5
    for index in range(v.numel()):
        nudge = torch.zeros(v.numel(), dtype=torch.float64)
        nudge[index] = step
        up, down = v.double() + nudge.view(v.shape), v.double() - nudge.view(v.shape)
        numeric.view(-1)[index] = (loss(up) - loss(down)) / (2 * step)
    assert float(numeric.abs().max()) > 1e-3
    torch.testing.assert_close(leaf.grad.double(), numeric, atol=2e-6, rtol=1e-4)
