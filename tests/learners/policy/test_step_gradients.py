"""The gradient with respect to the network's output, step by step, against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from euphonium.config import ObjectiveConfig
from euphonium.dynamics import StepTable, shifted_sigmas
from learners.policy.objective import OutputGradients, Transitions, evaluate_objective

VALUES = 6


def rows_of(table: StepTable, weight: float, shared: bool) -> tuple[Transitions, Tensor]:
    """One row a step, with noise that is known; the last two leave one state if ``shared``."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([0, 1, 2, 3, 3] if shared else [0, 1, 2, 3])
    of = torch.tensor([0, 1, 2, 3, 3]) if shared else None
    states = torch.randn(4, 2, 3, generator=generator)
    noise = torch.randn(len(steps), 2, 3, generator=generator)
    left = states if of is None else states[of]
    next_states = torch.stack(
        [table.sample(int(k), table.mean(int(k), x[None], torch.tanh(x)[None]), z[None])[0]
         for k, x, z in zip(steps, left, noise, strict=True)]
    )  # fmt: skip
    rows = Transitions(
        states=states, of=of, next_states=next_states, steps=steps, log_probs=torch.zeros(len(steps)), own_old=True,
        advantages=torch.tensor([[1.0, -2.0, 0.5, 3.0, 1.0]])[:, : len(steps)], gradients=None, conditioning={},
        weight=weight,
    )  # fmt: skip
    return rows, noise


@pytest.mark.parametrize("step_weights", ["uniform", "equaliser"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_lengths_are_those_of_the_log_probability(step_weights: str, weight: float) -> None:
    table = StepTable.build("flow_grpo", shifted_sigmas(5, 3.0), eta=0.7, sde_window=(0, 4))
    rows, noise = rows_of(table, weight, shared=False)
    found = OutputGradients(table.num_steps)
    scale = torch.ones((), requires_grad=True)
    objective = ObjectiveConfig(clip_range=0.5, step_weights=step_weights)  # type: ignore[arg-type]
    value = evaluate_objective(objective, table, lambda x, t, c: torch.tanh(x) * scale, rows, None, found)
    assert not found.states.any(), "nothing is known before the backward pass"
    value.loss.backward()
    weights = table.equaliser() if step_weights == "equaliser" else torch.ones(5)
    for k in range(4):
        # The mean of log N over the values has the gradient b z / (std d) with respect to the velocity.
        length = abs(float(rows.advantages[0, k])) * float(weights[k]) * float(table.coef_v[k].abs() / table.std[k])
        wanted = length * float(noise[k].norm()) / VALUES
        assert float(found.squares[k].sqrt()) == pytest.approx(wanted, rel=1e-4)
    assert found.states.tolist() == [1, 1, 1, 1, 0]


def test_rows_that_share_a_state_add_up() -> None:
    step = 3
    table = StepTable.build("flow_grpo", shifted_sigmas(5, 3.0), eta=0.7, sde_window=(0, 4))
    rows, noise = rows_of(table, 1.0, shared=True)
    found = OutputGradients(table.num_steps)
    scale = torch.ones((), requires_grad=True)
    evaluate_objective(
        ObjectiveConfig(clip_range=0.5), table, lambda x, t, c: torch.tanh(x) * scale, rows, None, found
    ).loss.backward()
    together = (rows.advantages[0, 3] * noise[3] + rows.advantages[0, 4] * noise[4]).norm()
    wanted = float(table.coef_v[step].abs() / table.std[step] * together) / VALUES
    assert float(found.squares[step].sqrt()) == pytest.approx(wanted, rel=1e-4)
    assert float(found.states[step]) == 1


def test_padding_is_not_counted() -> None:
    table = StepTable.build("flow_grpo", shifted_sigmas(5, 3.0), eta=0.7, sde_window=(0, 4))
    rows, _ = rows_of(table, 0.0, shared=False)
    found = OutputGradients(table.num_steps)
    scale = torch.ones((), requires_grad=True)
    evaluate_objective(
        ObjectiveConfig(), table, lambda x, t, c: torch.tanh(x) * scale, rows, None, found
    ).loss.backward()
    assert not found.states.any()
