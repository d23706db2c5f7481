import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from euphonium.config import KlConfig, ObjectiveConfig
from euphonium.dynamics import LAWS, Guidance, StepTable, shifted_sigmas
from learners.policy.objective import References, Transitions, clipped_surrogate, evaluate_objective
from tests.learners.policy.objective_rows import OPTIONS, constant, rows, table


def test_clipped_surrogate_is_the_smaller_branch() -> None:
    ratio = torch.tensor([0.8, 0.8, 1.0, 1.2, 1.2])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    losses, clipped = clipped_surrogate(ratio, advantages, 0.1)
    torch.testing.assert_close(losses, torch.tensor([-0.8, 0.9, -1.0, -1.1, 1.2]))
    assert clipped.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("kind", ["distill", "standard"])
def test_gradient_is_the_closed_form_on_policy(kind: str) -> None:
    """d loss / d v = -w A d log p / d v, with d log p / d v = b (x_next - mean) / (std^2 dims)."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 3, 2, generator=generator)
    t, transitions, g, z = rows(Guidance(scale=0.5), keep_gradient=kind == "standard", v_old=v, generator=generator)
    leaf = v.clone().requires_grad_(True)
    value = evaluate_objective(ObjectiveConfig(kind=kind), t, lambda *_: leaf, transitions)  # type: ignore[arg-type]
    value.loss.backward()
    assert torch.equal(value.ratio, torch.ones(4))
    shape = (-1, 1, 1)
    std = t.std[transitions.steps].view(shape)
    residual = std * z
    if kind == "distill":
        # Eq. 62: the sample deviates from the unguided mean by the guidance; under Eq. 58 that part cancels.
        residual = residual + t.coef_grad[transitions.steps].view(shape) * g
    score = t.coef_v[transitions.steps].view(shape) * residual / std**2 / 6
    expected = -0.25 * transitions.advantages[0].view(shape) * score
    torch.testing.assert_close(leaf.grad, expected.float(), atol=1e-6, rtol=1e-5)


def test_imitation_adds_the_push_itself_to_the_gradient() -> None:
    """d loss / d v gains -w c b g grad / (V dims), whatever the advantages say."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(4, 3, 2, generator=generator)
    t, transitions, g, _ = rows(Guidance(scale=0.5), keep_gradient=False, v_old=v, generator=generator)
    transitions = dataclasses.replace(transitions, gradients=g, guided_mean=False)
    gradients = []
    for weight in (0.0, 0.75):
        leaf = v.clone().requires_grad_(True)
        evaluate_objective(ObjectiveConfig(imitate_guidance=weight), t, lambda *_: leaf, transitions).loss.backward()  # noqa: B023
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    shape = (-1, 1, 1)
    push = t.coef_v[transitions.steps].view(shape) * t.coef_grad[transitions.steps].view(shape) * g
    expected = -0.25 * 0.75 * push / t.std[transitions.steps].view(shape) ** 2 / 6
    torch.testing.assert_close(gradients[1] - gradients[0], expected.float(), atol=1e-6, rtol=1e-4)


def test_guidance_in_the_mean_cannot_be_imitated_as_well() -> None:
    with pytest.raises(ValueError, match="imitate_guidance needs kind: distill"):
        ObjectiveConfig(kind="standard", imitate_guidance=1.0)


@pytest.mark.parametrize("keep_gradient", [True, False])
def test_equations_58_and_65(keep_gradient: bool) -> None:
    """The residual under a new policy: the guidance cancels in ``standard`` and remains in ``distill``."""
    generator = torch.Generator().manual_seed(1)
    v_old, v_new = torch.randn(2, 4, 3, 2, generator=generator).unbind(0)
    t, transitions, g, z = rows(Guidance(beta=2.0), keep_gradient=keep_gradient, v_old=v_old, generator=generator)
    k = transitions.steps
    shape = (-1, 1, 1)
    mean_new = t.mean(k, transitions.states, v_new, transitions.gradients)
    residual = transitions.next_states - mean_new
    # In the paper's signs: u = -v, so Delta_t (1 + t eps / (1 - t)) (u_old - u_new) = b (v_old - v_new).
    eps = 0.6**2 / 2
    delta = (t.sigmas[k] - t.sigmas[k + 1]).view(shape)
    sigma = t.sigmas[k].view(shape)
    velocity_part = delta * (1 + (1 - sigma) * eps / sigma) * (v_new - v_old)
    expected = math.sqrt(2 * eps) * delta.sqrt() * z + velocity_part
    if not keep_gradient:
        expected = expected + delta * eps / 2.0 * g
    torch.testing.assert_close(residual, expected.float(), atol=1e-6, rtol=1e-5)


def test_loss_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(4, 3, 2, generator=generator)
    t, transitions, _, _ = rows(None, keep_gradient=False, v_old=v, generator=generator)
    # Off policy, inside a wide clip range, so that the surrogate is smooth.
    config = ObjectiveConfig(clip_range=10.0)
    start = v + 0.01 * torch.randn(v.shape, generator=generator)

    def loss(values: Tensor) -> Tensor:
        return evaluate_objective(config, t, lambda *_: values, transitions).loss

    leaf = start.clone().requires_grad_(True)
    loss(leaf).backward()
    assert leaf.grad is not None
    direction = torch.randn(v.shape, generator=generator)
    step = 1e-2
    numeric = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
    torch.testing.assert_close((leaf.grad * direction).sum(), numeric, atol=1e-4, rtol=1e-2)


def test_clipped_rows_have_no_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(4, 3, 2, generator=generator)
    t, transitions, _, _ = rows(None, keep_gradient=False, v_old=v, generator=generator)
    moved_v = v + 0.2 * torch.randn(v.shape, generator=generator)
    clipped_rows = 0
    for sign in (1, -1):
        leaf = moved_v.clone().requires_grad_(True)
        signed = dataclasses.replace(transitions, advantages=sign * transitions.advantages)
        value = evaluate_objective(ObjectiveConfig(clip_range=1e-4), t, lambda *_, v=leaf: v, signed)
        value.loss.backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad.flatten(1).abs().sum(1) > 0, value.clipped == 0)
        clipped_rows += int(value.clipped.sum())
    # Every ratio has left the range, so each row is clipped under one sign of its advantage and free under the other.
    assert clipped_rows == 4


def off_policy(seed: int = 4) -> tuple[StepTable, Transitions, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v_old = torch.randn(4, 3, 2, generator=generator)
    t, transitions, _, _ = rows(None, keep_gradient=False, v_old=v_old, generator=generator)
    return t, transitions, v_old, v_old + 0.05 * torch.randn(v_old.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_the_gradient_of_its_value(name: str) -> None:
    """Central differences along a random direction, in double precision of the inputs' span."""
    config = OPTIONS[name]
    t, transitions, v_old, v_new = off_policy()
    anchor = v_old + 0.1
    references = References(anchor=constant(anchor), previous=constant(v_old), kl_weight=0.7)

    def loss(v: Tensor) -> Tensor:
        return evaluate_objective(config, t, constant(v), transitions, references).loss

    leaf = v_new.clone().requires_grad_(True)
    loss(leaf).backward()
    assert leaf.grad is not None
    direction = torch.randn(v_new.shape, generator=torch.Generator().manual_seed(9))
    step = 1e-2
    numeric = (loss(v_new + step * direction) - loss(v_new - step * direction)) / (2 * step)
    torch.testing.assert_close((leaf.grad * direction).sum(), numeric, atol=2e-4, rtol=1e-2)


def test_equaliser_scales_each_rows_loss() -> None:
    t, transitions, _, v_new = off_policy()
    scale = t.equaliser()[transitions.steps].float()
    leaves = {}
    for weights in ("uniform", "equaliser"):
        leaf = v_new.clone().requires_grad_(True)
        config = ObjectiveConfig(step_weights=weights, clip_range=10.0)  # type: ignore[arg-type]
        evaluate_objective(config, t, constant(leaf), transitions).loss.backward()
        leaves[weights] = leaf.grad
    torch.testing.assert_close(leaves["equaliser"], scale.view(-1, 1, 1) * leaves["uniform"])


def test_kl_penalty_is_the_weighted_sum_of_both_terms() -> None:
    t, transitions, v_old, v_new = off_policy()
    anchor = v_old - 0.2
    steps = transitions.steps
    means = {n: t.mean(steps, transitions.states, v) for n, v in (("new", v_new), ("old", v_old), ("anchor", anchor))}
    config = ObjectiveConfig(
        clip_range=10.0,
        kl=KlConfig(anchor="moving", anchor_weight=2.0, previous="gaussian", previous_weight=5.0),
    )
    references = References(anchor=constant(anchor), previous=constant(v_old), kl_weight=0.3)
    value = evaluate_objective(config, t, constant(v_new), transitions, references)
    plain = evaluate_objective(ObjectiveConfig(clip_range=10.0), t, constant(v_new), transitions)
    to_anchor, to_old = t.kl(steps, means["new"], means["anchor"]), t.kl(steps, means["new"], means["old"])
    torch.testing.assert_close(value.kl_anchor, to_anchor)
    torch.testing.assert_close(value.kl_previous, to_old)
    expected = plain.loss + 0.25 * 0.3 * (2 * to_anchor + 5 * to_old).sum()
    torch.testing.assert_close(value.loss, expected)
    assert float(value.loss) > float(plain.loss)


def test_losses_of_components_add_up_and_are_clipped_apart() -> None:
    t, transitions, _, v_new = off_policy()
    a = transitions.advantages[0]
    split = dataclasses.replace(transitions, advantages=torch.stack([a, -0.5 * a]))
    config = ObjectiveConfig(clip_range=1e-3)
    whole = evaluate_objective(config, t, constant(v_new), split)
    parts = [
        evaluate_objective(config, t, constant(v_new), dataclasses.replace(transitions, advantages=part[None]))
        for part in split.advantages
    ]
    torch.testing.assert_close(whole.loss, parts[0].loss + parts[1].loss)
    # Opposite signs: of the two components of a row that left the range, exactly one is clipped.
    torch.testing.assert_close(whole.clipped, torch.full((4,), 0.5))


def test_ratio_normalisation_centres_the_log_ratio() -> None:
    """Off policy the log-ratio of a Gaussian step has mean -KL; normalised it has mean 0, and no 1 / std in it."""
    t = table()
    generator = torch.Generator().manual_seed(0)
    count, k = 20_000, 4
    steps = torch.full((count,), k)
    x = torch.randn(1, 8, generator=generator).expand(count, 8)
    v_old = torch.randn(1, 8, generator=generator).expand(count, 8)
    v_new = v_old + 0.3
    mean_old = t.mean(steps, x, v_old)
    x_next = t.sample(k, mean_old, torch.randn(count, 8, generator=generator))
    transitions = Transitions(
        states=x, next_states=x_next, steps=steps, log_probs=t.log_prob(steps, x_next, mean_old),
        advantages=torch.ones(1, count), gradients=None, conditioning={}, weight=1 / count,
    )  # fmt: skip
    references = References(previous=constant(v_old))
    guarded = evaluate_objective(
        ObjectiveConfig(ratio_normalisation=True, clip_range=10.0), t, constant(v_new), transitions, references
    )
    plain = evaluate_objective(ObjectiveConfig(clip_range=10.0), t, constant(v_new), transitions)
    divergence = float(t.kl(k, t.mean(steps, x, v_new), mean_old).mean())
    assert float(plain.ratio.log().mean()) == pytest.approx(-divergence, rel=0.05)
    assert abs(float(guarded.ratio.log().mean())) < 0.05 * divergence
    expected_spread = abs(float(t.coef_v[k])) * 0.3 / math.sqrt(8)
    assert float(guarded.ratio.log().std()) == pytest.approx(expected_spread, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig(ratio_normalisation=True, clip_range=10.0),
        ObjectiveConfig(kl=KlConfig(previous="gaussian", previous_weight=5.0), clip_range=10.0),
    ],
)
def test_a_policy_that_has_not_moved_is_its_own_predecessor(config: ObjectiveConfig) -> None:
    """What an iteration's first update leaves out is what a copy of the policy would have given, gradients included."""
    t, transitions, _, v_new = off_policy()
    found = []
    for references in (References(previous=constant(v_new.clone()), kl_weight=0.7), References(kl_weight=0.7)):
        v = v_new.clone().requires_grad_()
        value = evaluate_objective(config, t, constant(v), transitions, references)
        value.loss.backward()
        found.append((value.loss.detach(), value.ratio, value.kl_previous, v.grad))
    assert float(found[0][3].abs().max()) > 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    law=st.sampled_from([law for law in LAWS if law != "ode"]),
    kind=st.sampled_from(["distill", "standard"]),
    num_steps=st.integers(3, 20),
    eta=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_on_policy_every_objective_starts_at_ratio_one(
    law: str, kind: str, num_steps: int, eta: float, seed: int
) -> None:
    """For every law; the loss is then minus the sum of the advantages, and nothing is clipped."""
    t = StepTable.build(law, shifted_sigmas(num_steps, 3.0), eta=eta, guidance=Guidance(scale=0.4))
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor(
        [t.stochastic_steps[0], t.stochastic_steps[-1], t.stochastic_steps[len(t.stochastic_steps) // 2]]
    )
    x, v, g, z = torch.randn(4, 3, 4, 2, generator=generator).unbind(0)
    x_next = t.mean(steps, x, v, g) + t.std[steps].float().view(-1, 1, 1) * z
    gradients = g if kind == "standard" else None
    transitions = Transitions(
        states=x, next_states=x_next, steps=steps, log_probs=t.log_prob(steps, x_next, t.mean(steps, x, v, gradients)),
        advantages=torch.randn(1, 3, generator=generator), gradients=gradients, conditioning={}, weight=0.5,
    )  # fmt: skip
    value = evaluate_objective(ObjectiveConfig(kind=kind), t, constant(v), transitions)  # type: ignore[arg-type]
    assert torch.equal(value.ratio, torch.ones(3))
    assert not value.clipped.any()
    torch.testing.assert_close(value.loss, -0.5 * transitions.advantages.sum())
