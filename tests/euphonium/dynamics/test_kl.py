import pytest
import torch

from euphonium.dynamics.kl import KlController, k3_estimate, log_ratio_estimate


def controller(**options: object) -> KlController:
    settings = {
        "minimum": 1e-7, "maximum": 1e-5, "warmup_updates": 4, "target": 1.0, "history": 2, "direction": "published",
    }  # fmt: skip
    return KlController(**(settings | options))  # type: ignore[arg-type]


def test_estimates_agree_with_the_divergence_of_two_gaussians() -> None:
    """Both are unbiased for KL(old || new) on samples of the old policy."""
    generator = torch.Generator().manual_seed(0)
    old, new = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.3, 1.0)
    x = torch.randn(400_000, generator=generator)
    expected = float(torch.distributions.kl_divergence(old, new))
    for estimate in (log_ratio_estimate, k3_estimate):
        values = estimate(new.log_prob(x), old.log_prob(x))
        assert float(values.mean()) == pytest.approx(expected, rel=0.03)
    assert float(k3_estimate(new.log_prob(x), old.log_prob(x)).min()) >= 0


def test_on_policy_k3_is_flat_and_the_log_ratio_is_not() -> None:
    for estimate, slope in ((k3_estimate, 0.0), (log_ratio_estimate, -1.0)):
        log_prob = torch.zeros(3, requires_grad=True)
        estimate(log_prob, torch.zeros(3)).sum().backward()
        assert log_prob.grad is not None
        torch.testing.assert_close(log_prob.grad, torch.full((3,), slope))


def test_weight_rises_linearly_to_its_maximum() -> None:
    c = controller()
    weights = [c.weight]
    for _ in range(4):
        c.observe(1.0)
        weights.append(c.weight)
    expected = [1e-7 + (1e-5 - 1e-7) * k / 4 for k in range(5)]
    assert weights == pytest.approx(expected)


def test_without_a_target_the_weight_stays_at_the_end_of_the_warm_up() -> None:
    c = controller(target=None)
    weights = []
    for kl in (9.0, 9.0, 0.0, 9.0, 9.0, 9.0, 0.0, 0.0):
        c.observe(kl)
        weights.append(c.weight)
    assert weights[3:] == [1e-5] * 5
    b = controller(target=None)
    b.restore(c.state())
    b.observe(9.0)
    assert b.weight == 1e-5


@pytest.mark.parametrize(("direction", "kl", "factor"), [
    ("published", 2.0, 0.9), ("published", 0.2, 1.1), ("published", 1.2, 1.0),
    ("usual", 2.0, 1.1), ("usual", 0.2, 0.9), ("usual", 0.8, 1.0),
])  # fmt: skip
def test_feedback_has_the_published_or_the_usual_sign(direction: str, kl: float, factor: float) -> None:
    c = controller(warmup_updates=0, minimum=1e-9, direction=direction)
    c.weight = 1e-6
    c.observe(kl)
    assert c.weight == pytest.approx(factor * 1e-6)


def test_weight_stays_in_its_bounds_and_averages_its_history() -> None:
    c = controller(warmup_updates=0, direction="usual")
    for _ in range(50):
        c.observe(10.0)
    assert c.weight == 1e-5
    for _ in range(200):
        c.observe(0.0)
    assert c.weight == 1e-7
    c = controller(warmup_updates=0)
    c.observe(3.0)
    before = c.weight
    c.observe(0.0)  # mean 1.5 is within the tolerance
    assert c.weight == before


def test_a_restored_controller_goes_on_the_same() -> None:
    a, b = controller(), controller()
    for kl in (2.0, 0.1, 5.0, 1.0, 9.0):
        a.observe(kl)
    b.restore(a.state())
    for kl in (9.0, 0.1, 0.2):
        a.observe(kl)
        b.observe(kl)
        assert a.weight == b.weight
