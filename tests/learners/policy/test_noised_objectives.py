"""The objectives of noised samples, as the learner evaluates them on micro-batches."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from euphonium.config import KlConfig, NftConfig, ObjectiveConfig
from euphonium.dynamics import StepTable, shifted_sigmas
from euphonium.generators.conditioning import Conditioning
from learners.policy.objective import OutputGradients, References, Transitions, Velocity, evaluate_objective

ROWS, SHAPE = 6, (2, 3)
TABLE = StepTable.build("ode", shifted_sigmas(8, 3.0))
NFT = ObjectiveConfig(kind="nft", nft=NftConfig(mixture=0.5, advantage_range=4.0), updates_per_iteration=2)
DPO = ObjectiveConfig(kind="dpo", kl=KlConfig(anchor="fixed", weight=6.0))


def micro_batch(*, steps: tuple[int, ...] = (0, 0, 3, 3, 7, 7)) -> Transitions:
    generator = torch.Generator().manual_seed(4)
    data, noise = (torch.randn(ROWS, *SHAPE, generator=generator) for _ in range(2))
    k = torch.tensor(steps)
    return Transitions(
        states=TABLE.noised(k, data, noise), next_states=data, steps=k, log_probs=torch.zeros(ROWS),
        advantages=torch.tensor([[1.0, -1.0, 3.0, -0.5, -9.0, 9.0]]), gradients=None, conditioning={}, weight=1 / ROWS,
    )  # fmt: skip


def linear(scale: Tensor, shift: float = 0.0) -> Velocity:
    """A network of one parameter, which knows state and time."""

    def velocity(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return scale * x + shift + time.view(-1, 1, 1)

    return velocity


def at(policy: float, old: float | None = None) -> References:
    frozen = torch.tensor(policy if old is None else old)
    return References(anchor=linear(frozen), previous=linear(frozen), kl_weight=6.0)


def test_nft_has_the_loss_of_its_equations() -> None:
    rows, scale, old = micro_batch(), torch.tensor(0.7, requires_grad=True), 0.4
    value = evaluate_objective(NFT, TABLE, linear(scale), rows, at(0.7, old))
    expected = 0.0
    for i in range(ROWS):
        x, data, sigma = rows.states[i].double(), rows.next_states[i].double(), float(TABLE.sigmas[rows.steps[i]])
        v, v_old = (float(scale.detach()) * x + sigma, old * x + sigma)
        r = min(max(float(rows.advantages[0, i]) / 4.0 / 2 + 0.5, 0), 1)
        for share, implied in ((r, 0.5 * v_old + 0.5 * v), (1 - r, 1.5 * v_old - 0.5 * v)):
            error = x - sigma * implied - data
            expected += share * float(error.square().mean() / error.abs().mean()) / 0.5 * 4.0 / ROWS
    assert float(value.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(value.ratio, torch.ones(ROWS))
    v = linear(scale.detach())(rows.states, TABLE.times[rows.steps].float(), {})
    target = (rows.states - rows.next_states) / TABLE.sigmas[rows.steps].float().view(-1, 1, 1)
    torch.testing.assert_close(value.error, (v - target).square().flatten(1).mean(dim=1), rtol=1e-4, atol=1e-5)
    moved = (0.3 * rows.states).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(value.kl_previous, moved)


def test_nfts_first_update_needs_no_copy_of_the_old_policy() -> None:
    gradients = []
    for references in (References(), at(0.7)):
        scale = torch.tensor(0.7, requires_grad=True)
        value = evaluate_objective(NFT, TABLE, linear(scale), micro_batch(), references)
        value.loss.backward()
        gradients.append((float(value.loss.detach()), scale.grad))
    assert gradients[0] == gradients[1]
    assert gradients[0][1] is not None
    assert float(gradients[0][1]) != 0


def test_nfts_gradient_is_advantage_times_that_of_denoising() -> None:
    """At the old policy, and within the range of advantages, whatever beta and the range are."""
    rows = dataclasses.replace(micro_batch(), advantages=torch.tensor([[1.0, -1.0, 0.3, -0.5, 0.9, 0.0]]))
    scale = torch.tensor(0.7, requires_grad=True)
    predicted = TABLE.predicted_data(
        rows.steps, rows.states, linear(scale)(rows.states, TABLE.times[rows.steps].float(), {})
    )
    error = (predicted - rows.next_states).flatten(1)
    weighted = error.square().mean(dim=1) / error.detach().abs().mean(dim=1)
    (rows.advantages[0] * weighted).mean().backward()
    for settings in (NftConfig(), NftConfig(mixture=0.1, advantage_range=2.0)):
        policy = torch.tensor(0.7, requires_grad=True)
        config = ObjectiveConfig(kind="nft", nft=settings)
        evaluate_objective(config, TABLE, linear(policy), rows).loss.backward()
        assert policy.grad is not None
        assert scale.grad is not None
        assert float(policy.grad) == pytest.approx(float(scale.grad), rel=1e-4)


def test_nfts_penalty_is_the_distance_of_the_outputs() -> None:
    config = NFT.model_copy(update={"kl": KlConfig(anchor="fixed", anchor_weight=2.0)})
    rows, policy = micro_batch(), linear(torch.tensor(0.7))
    plain = evaluate_objective(NFT, TABLE, policy, rows, at(0.7, 0.4))
    penalised = evaluate_objective(config, TABLE, policy, rows, at(0.7, 0.4))
    distance = (0.3 * rows.states).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(penalised.kl_anchor, distance)
    torch.testing.assert_close(penalised.loss, plain.loss + 6.0 * 2.0 * distance.mean())


def test_dpo_has_the_loss_of_its_equations() -> None:
    rows, policy = micro_batch(), 0.7
    value = evaluate_objective(DPO, TABLE, linear(torch.tensor(policy)), rows, at(policy, 0.4))
    gained, losses = [], []
    for i in range(ROWS):
        x, data, sigma = rows.states[i].double(), rows.next_states[i].double(), float(TABLE.sigmas[rows.steps[i]])
        noise = (x - (1 - sigma) * data) / sigma
        errors = [float((s * x + sigma - (noise - data)).square().mean()) for s in (policy, 0.4)]
        gained.append(errors[1] - errors[0])
    for first, better in ((0, 0), (2, 2), (4, 5)):
        worse = first + 1 if better == first else first
        losses.append(math.log1p(math.exp(-3.0 * (gained[better] - gained[worse]))))
    assert float(value.loss) == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert value.preferred.tolist() == [float(loss < math.log(2)) for loss in losses for _ in range(2)]


@pytest.mark.parametrize("config", [NFT, DPO], ids=["nft", "dpo"])
def test_micro_batches_add_up(config: ObjectiveConfig) -> None:
    rows = micro_batch()
    found = []
    for size in (2, 4, ROWS):
        scale = torch.tensor(0.7, requires_grad=True)
        for begin in range(0, ROWS, size):
            part = slice(begin, begin + size)
            batch = dataclasses.replace(
                rows, states=rows.states[part], next_states=rows.next_states[part], steps=rows.steps[part],
                log_probs=rows.log_probs[part], advantages=rows.advantages[:, part],
            )  # fmt: skip
            evaluate_objective(config, TABLE, linear(scale), batch, at(0.7, 0.4)).loss.backward()
        assert scale.grad is not None
        found.append(float(scale.grad))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert abs(found[0]) > 1e-3


def test_dpos_gradient_agrees_with_finite_differences() -> None:
    rows, step = micro_batch(), 1e-2
    scale = torch.tensor(0.7, requires_grad=True)
    evaluate_objective(DPO, TABLE, linear(scale), rows, at(0.7, 0.4)).loss.backward()

    def loss(policy: float) -> float:
        return float(evaluate_objective(DPO, TABLE, linear(torch.tensor(policy)), rows, at(policy, 0.4)).loss)

    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx((loss(0.7 + step) - loss(0.7 - step)) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("config", [NFT, DPO], ids=["nft", "dpo"])
def test_lengths_of_the_outputs_gradients_are_noted_by_level(config: ObjectiveConfig) -> None:
    gradients = OutputGradients(TABLE.num_steps)
    scale = torch.tensor(0.7, requires_grad=True)
    evaluate_objective(config, TABLE, linear(scale), micro_batch(), at(0.7, 0.4), gradients).loss.backward()
    assert gradients.states.tolist() == [2, 0, 0, 2, 0, 0, 0, 2]
    assert (gradients.squares > 0).tolist() == [True, False, False, True, False, False, False, True]


def test_pairs_need_their_reference() -> None:
    with pytest.raises(ValueError, match="reference"):
        evaluate_objective(DPO, TABLE, linear(torch.tensor(0.7)), micro_batch())
