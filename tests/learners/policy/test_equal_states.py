"""States that samples share are computed once: the numbers are those of one computation a sample."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.guidance import ScaledGradients
from actors.rollout import RolloutWorker
from actors.sampler import Recording, Rewarded, initial_noise, sample_group, select_steps, state_rows
from actors.sources import EqualStatesOnce
from euphonium.config import GuidanceConfig, KlConfig, ObjectiveConfig, RunConfig, load_config
from euphonium.dynamics import Guidance, StepTable, shifted_sigmas
from euphonium.wire.later import Later
from euphonium.wire.records import GroupPayload, GroupTask, TrainingGroup
from learners.policy.batching import load_rows, plan_updates
from learners.policy.objective import ObjectiveValue, References, Transitions, evaluate_objective
from tests.learners.groups import training_group

CPU = torch.device("cpu")
GROUP = 5
GUIDANCE = Guidance(scale=0.7, window=(0, 3))
LAWS = ("dance", "flow_grpo", "sage", "cps")
OBJECTIVES = {
    "plain": ObjectiveConfig(clip_range=0.5),
    "guided mean": ObjectiveConfig(clip_range=0.5, kind="standard"),
    "imitation": ObjectiveConfig(clip_range=0.5, imitate_guidance=0.5),
    "equaliser": ObjectiveConfig(clip_range=0.5, step_weights="equaliser"),
    "anchor": ObjectiveConfig(
        clip_range=0.5, kl=KlConfig(weight=0.3, anchor="fixed", previous="gaussian", previous_weight=0.2)
    ),
    "ratio norm": ObjectiveConfig(clip_range=0.5, ratio_normalisation=True),
}


class Counting:
    """A quadratic process reward that counts the states it sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        self.seen.append(len(x))
        return Later(lambda: (-x.square().flatten(1).sum(1), -2 * x if with_gradient else None))


class Field(torch.nn.Module):
    """A small velocity field that counts the states it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.8, -0.3]))
        self.seen: list[int] = []

    def forward(self, x: Tensor, time: Tensor | float, _conditioning: object = None) -> Tensor:
        self.seen.append(len(x))
        shape = (-1, 1, 1)
        time = time if isinstance(time, float) else time.view(shape)
        return torch.tanh(x * self.scale) * (0.5 + time)


def drawn(law: str, field: Field, source: Counting, objective: ObjectiveConfig) -> tuple[StepTable, GroupPayload]:
    window = (1, 5) if law != "sage" else (1, 4)
    table = StepTable.build(law, shifted_sigmas(6, 2.0), eta=0.4, guidance=GUIDANCE, sde_window=window)
    start, noise = initial_noise((3, 2), GROUP, seed=3, shared=True, device=CPU)
    kept = select_steps(table, GROUP, 0.8, seed=5)
    recording = Recording(
        steps=kept, guided_mean=objective.kind == "standard", keep_gradients=objective.keeps_gradients
    )
    result = sample_group(
        table, lambda x, time: field(x, time).detach(), start, noise, recording, EqualStatesOnce(source)
    )
    gradients = None if result.gradients is None else result.gradients.numpy()
    payload = GroupPayload(
        states=result.states.numpy(), rows=result.rows.numpy(), next_rows=result.next_rows.numpy(), steps=kept.numpy(),
        log_probs=result.log_probs.numpy(), gradients=gradients, conditioning={"text": np.ones((1, 2), np.float32)},
    )  # fmt: skip
    return table, payload


def apart(rows: Transitions) -> Transitions:
    """The same rows, each with a state of its own."""
    assert rows.of is not None
    text = {name: value[:1].expand(len(rows.of), *value.shape[1:]) for name, value in rows.conditioning.items()}
    return dataclasses.replace(rows, states=rows.states[rows.of], of=None, conditioning=text)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_that_of_a_state_for_every_row(law: str, name: str) -> None:
    objective, field, source = OBJECTIVES[name], Field(), Counting()
    table, payload = drawn(law, field, source, objective)
    first = table.stochastic_steps[0]
    assert field.seen == [1] * (first + 1) + [GROUP] * (table.num_steps - first - 1)
    assert source.seen == [1] * (first + 1) + [GROUP] * (2 - first), "a gradient of each state is asked for once"
    sharing = int((payload.steps[:, 0] == first).sum())
    assert sharing > 1

    advantages = np.random.default_rng(0).standard_normal((1, GROUP, table.num_steps)).astype(np.float32)
    group = training_group(payload, advantages)
    assert group.states == group.rows - sharing + 1
    (((batch,),),) = plan_updates([(group.rows, group.states)], 1, 100, 1)
    rows = load_rows(batch, group, payload, CPU, guided_mean=objective.kind == "standard")
    assert len(rows.states) == group.states
    assert len(rows.steps) == group.rows

    moved, other = Field(), Field()
    moved.scale.data += 0.01
    other.scale.data -= 0.02

    references = References(anchor=other, previous=other, kl_weight=0.3)

    def value(of: Transitions) -> tuple[ObjectiveValue, Tensor]:
        moved.zero_grad()
        result = evaluate_objective(objective, table, moved, of, references)
        result.loss.backward()
        assert moved.scale.grad is not None
        return result, moved.scale.grad.clone()

    shared, gradient = value(rows)
    assert moved.seen[-1] == group.states
    separate, expected = value(apart(rows))
    assert moved.seen[-1] == group.rows
    torch.testing.assert_close(shared.loss, separate.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shared.ratio, separate.ratio, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    numeric = []
    for i in range(2):
        sides = []
        for step in (1e-3, -1e-3):
            moved.scale.data[i] += step
            sides.append(float(evaluate_objective(objective, table, moved, rows, references).loss.detach()))
            moved.scale.data[i] -= step
        numeric.append((sides[0] - sides[1]) / 2e-3)
    if name != "imitation":  # whose target is the policy's own mean
        torch.testing.assert_close(gradient, torch.tensor(numeric), rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_every_row_of_a_chosen_sample_is_in_one_micro_batch(size: int) -> None:
    table, payload = drawn("dance", Field(), Counting(), ObjectiveConfig())
    advantages = np.arange(GROUP * table.num_steps, dtype=np.float32).reshape(1, GROUP, -1)
    group = training_group(payload, advantages, samples=np.array([0, 2, 4]))
    (shares,) = plan_updates([(group.rows, group.states)], 1, size, 2)
    seen = [
        rows
        for share in shares
        for batch in share
        if batch.weight > 0
        for rows in [load_rows(batch, group, payload, CPU)]
    ]
    assert all(len(rows.states) <= size for rows in seen)
    assert sorted(a for rows in seen for a in rows.advantages[0].tolist()) == sorted(
        float(advantages[0, i, k]) for i in (0, 2, 4) for k in payload.steps[i]
    )
    for rows in seen:
        assert rows.of is not None
        mean = table.mean(
            rows.steps, rows.states[rows.of], Field()(rows.states[rows.of], table.times[rows.steps].float())
        )
        torch.testing.assert_close(table.log_prob(rows.steps, rows.next_states, mean), rows.log_probs)


def test_members_of_different_strengths_part_where_guidance_begins() -> None:
    table = StepTable.build("dance", shifted_sigmas(6, 2.0), eta=0.4, guidance=GUIDANCE, sde_window=(2, 5))
    start, noise = initial_noise((3, 2), 4, seed=3, shared=True, device=CPU)
    field, source = Field(), Counting()
    settings = GuidanceConfig(scale=0.7, window=(0, 3), strengths=(0.0, 1.0))
    sample_group(
        table, lambda x, time: field(x, time).detach(), start, noise,
        Recording(steps=select_steps(table, 4, 1.0, seed=1)),
        ScaledGradients(EqualStatesOnce(source), settings, table),
    )  # fmt: skip
    assert field.seen == [1, 4, 4, 4, 4, 4], "the first step is deterministic, but pushes half of them"
    assert source.seen == [1, 4, 4]


def test_a_real_group_is_the_same_with_its_states_apart(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("sampler.guidance=null", "rewards.process=null", "advantage.mode=outcome")
    worker = RolloutWorker(config, CPU)
    info, latents, payload = worker.generate(
        GroupTask(group_id=0, prompt="a red car moving left on a gray background", seed=4), None
    )
    group = TrainingGroup(
        info=info, advantages=np.ones((1, len(latents), config.sampler.num_steps), np.float32),
        samples=np.arange(len(latents)), counted=len(latents),
    )  # fmt: skip
    (((batch,),),) = plan_updates([(group.rows, group.states)], 1, 100, 1)
    rows = load_rows(batch, group, payload, CPU)
    assert group.states == group.rows - len(latents) + 1
    for of in (rows, apart(rows)):
        value = evaluate_objective(
            config.objective, worker.table(), lambda x, s, c: worker.family.velocity(worker.transformer, x, s, c), of
        )
        assert float(value.deviation.max()) < 1e-5


@pytest.mark.parametrize("path", sorted(Path("recipes/embedded").glob("*grpo*.yaml")), ids=lambda path: path.stem)
def test_recipes_with_shared_noise_share_a_state(path: Path) -> None:
    config = load_config(path)
    table = config.sampler.table(shifted_sigmas(config.sampler.num_steps, 3.0))
    steps = select_steps(table, 4, 1.0, seed=0)
    rows, following, count = state_rows(steps, table.stochastic_steps[0] if config.sampler.shared_noise else None)
    assert len(rows.unique()) == rows.numel() - 3 * config.sampler.shared_noise
    assert int(max(rows.max(), following.max())) == count - 1
