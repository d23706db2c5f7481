"""Rollout worker, PRM scorer and objective together, without Ray."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.rollout import RolloutWorker
from actors.sampler import Recording, Rewarded, Velocity, initial_noise, sample_group, select_steps
from euphonium.config import RunConfig
from euphonium.dynamics import Guidance, StepTable, shifted_sigmas
from euphonium.errors import ConfigError
from euphonium.rewards.process import ProcessRewardModel
from euphonium.wire.later import Later
from euphonium.wire.records import GroupTask, TrainingGroup
from euphonium.wire.weights.manifest import pack, unpack
from learners.policy.batching import MicroBatch, load_rows
from learners.policy.objective import evaluate_objective
from reward_servers.prm import PrmScorer

CPU = torch.device("cpu")
TASK = GroupTask(group_id=5, prompt="a red car moving left on a white background", seed=11)
MakeConfig = Callable[..., RunConfig]


class Local:
    """A process-reward source that calls a scorer in this process, and notes the order of events."""

    def __init__(self, scorer: PrmScorer) -> None:
        self.scorer = scorer
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, conditioning: dict[str, Tensor], table: StepTable, velocity: Velocity) -> "Local":
        self.prompt = {name: t.numpy() for name, t in conditioning.items()}
        self.sigmas = [float(s) for s in table.sigmas]
        return self

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        self.calls.append((k, with_gradient))
        sigma = self.sigmas[k]
        rewards, gradient = self.scorer.reward_and_gradient(x.numpy(), sigma, self.prompt, with_gradient)
        return Later(lambda: (torch.tensor(rewards), None if gradient is None else torch.tensor(gradient)))


def test_select_steps_takes_the_fraction_of_stochastic_steps() -> None:
    table = StepTable.build("dance", shifted_sigmas(10, 3.0), eta=0.3, sde_window=(0, 9))
    steps = select_steps(table, 40, 0.6, seed=0)
    assert steps.shape == (40, 6)
    assert set(steps.flatten().tolist()) == set(range(9))
    assert all(len(set(row)) == 6 and row == sorted(row) for row in steps.tolist())
    assert torch.equal(steps, select_steps(table, 40, 0.6, seed=0))
    assert not torch.equal(steps, select_steps(table, 40, 0.6, seed=1))


def test_shared_noise_is_shared_within_a_group_only() -> None:
    shared, _ = initial_noise((2, 3), 4, seed=0, shared=True, device=CPU)
    assert all(torch.equal(shared[0], row) for row in shared)
    own, _ = initial_noise((2, 3), 4, seed=0, shared=False, device=CPU)
    assert len({tuple(row.flatten().tolist()) for row in own}) == 4
    other, _ = initial_noise((2, 3), 4, seed=1, shared=True, device=CPU)
    assert not torch.equal(shared[0], other[0])


def test_guided_sampling_follows_the_table() -> None:
    """Against the recursion written out, with a quadratic process reward."""
    table = StepTable.build("dance", shifted_sigmas(6, 2.0), eta=0.4, guidance=Guidance(scale=0.7, window=(2, 5)))

    class Quadratic:
        def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
            return Later(lambda: (-x.square().flatten(1).sum(1), -2 * x if with_gradient else None))

    start, noise = initial_noise((3, 2), 5, seed=3, shared=True, device=CPU)
    kept = select_steps(table, 5, 0.5, seed=3)
    result = sample_group(
        table, lambda x, sigma: torch.tanh(x) * sigma, start, noise,
        Recording(steps=kept, scored_states=range(7)), Quadratic(),
    )  # fmt: skip
    _, replay = initial_noise((3, 2), 5, seed=3, shared=True, device=CPU)
    x = start
    for k in range(6):
        v = torch.tanh(x) * float(table.sigmas[k])
        mean = table.mean(k, x, v)
        guided = mean + float(table.coef_grad[k]) * -2 * x
        x_next = guided + float(table.std[k]) * torch.randn(x.shape, generator=replay)
        assert result.process_rewards is not None
        torch.testing.assert_close(result.process_rewards[:, k], -x.square().flatten(1).sum(1))
        for i in range(5):
            if k in kept[i]:
                j = kept[i].tolist().index(k)
                torch.testing.assert_close(result.states[result.rows[i, j]], x[i], rtol=0, atol=0)
                torch.testing.assert_close(result.states[result.next_rows[i, j]], x_next[i])
                torch.testing.assert_close(result.log_probs[i, j], table.log_prob(k, x_next, mean)[i])
        x = x_next
    # No state is kept twice, and none that no transition needs; the first one is the same for all samples.
    needed = {(i if k else 0, k) for i, row in enumerate(kept.tolist()) for step in row for k in (step, step + 1)}
    assert len(result.states) == len(needed) < 2 * kept.numel()
    torch.testing.assert_close(result.final, x)
    torch.testing.assert_close(result.process_rewards[:, 6], -x.square().flatten(1).sum(1))


def test_the_process_reward_is_asked_for_before_the_velocity_and_awaited_after() -> None:
    events: list[str] = []

    class Noting:
        def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
            events.append("submit")

            def result() -> Rewarded:
                events.append("result")
                return torch.zeros(2), torch.zeros_like(x)

            return Later(result)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        events.append("velocity")
        return x

    table = StepTable.build("dance", shifted_sigmas(3, 1.0), eta=0.4, guidance=Guidance(scale=1.0))
    start, noise = initial_noise((2,), 2, seed=0, shared=True, device=CPU)
    kept = select_steps(table, 2, 1.0, 0)
    sample_group(table, velocity, start, noise, Recording(steps=kept), Noting())
    assert events[:9] == ["submit", "velocity", "result"] * 3


@pytest.mark.parametrize("kind", ["distill", "standard"])
def test_rollout_and_learner_agree_on_the_ratio(make_config: MakeConfig, kind: str) -> None:
    config = make_config(f"objective.kind={kind}", "sampler.guidance.scale=5.0")
    worker, scorer = RolloutWorker(config, CPU), PrmScorer(config, CPU)
    source = Local(scorer)
    info, latents, payload = worker.generate(TASK, source)
    assert latents.shape == (3, 16, 5, 4, 4)
    assert info.fingerprint == worker.table().fingerprint()
    assert (payload.gradients is not None) == (kind == "standard")
    assert source.calls == [(0, False), (1, True), (2, True), (3, False)]
    group = TrainingGroup(info=info, advantages=np.ones((1, 3, 4), dtype=np.float32), samples=np.arange(3), counted=3)
    rows = load_rows(MicroBatch(group=0, begin=0, end=group.states, weight=1.0), group, payload, CPU)
    value = evaluate_objective(
        config.objective, worker.table(), lambda x, s, c: worker.family.velocity(worker.transformer, x, s, c), rows
    )
    assert float((value.ratio - 1).abs().max()) < 1e-5


def test_steps_that_reuse_passes_leave_trained_ones_exact(make_config: MakeConfig) -> None:
    plain = ("sampler.guidance=null", "rewards.process=null", "advantage.mode=outcome", "sampler.sde_window=[1,3]")
    exact = RolloutWorker(make_config(*plain), CPU)
    cheap = RolloutWorker(make_config(*plain, "rollout.reuse_below=1e9", "evaluation.reuse_below=1e-9"), CPU)
    cheap.load_weights(0, exact.transformer.named_parameters())
    info, latents, payload = cheap.generate(TASK, None)
    assert info.reused == pytest.approx(1 / 4), "the last of four steps; the first has nothing to reuse"
    assert not np.allclose(latents, exact.generate(TASK, None)[1])
    group = TrainingGroup(info=info, advantages=np.ones((1, 3, 4), dtype=np.float32), samples=np.arange(3), counted=3)
    rows = load_rows(MicroBatch(group=0, begin=0, end=group.states, weight=1.0), group, payload, CPU)
    value = evaluate_objective(
        exact.config.objective, exact.table(), lambda x, s, c: exact.family.velocity(exact.transformer, x, s, c), rows
    )
    assert float((value.ratio - 1).abs().max()) < 1e-5
    again = cheap.generate(TASK, None)[1]
    np.testing.assert_array_equal(again, latents, err_msg="groups depend on the ones before")
    np.testing.assert_array_equal(cheap.evaluate([TASK.prompt], [1]), exact.evaluate([TASK.prompt], [1]))


def test_rollouts_pay_nothing_where_evaluations_alone_reuse_passes(make_config: MakeConfig) -> None:
    worker = RolloutWorker(
        make_config("sampler.guidance=null", "rewards.process=null", "evaluation.reuse_below=1e9"), CPU
    )
    assert worker.cache is not None
    info, _, _ = worker.generate(TASK, None)
    assert (info.reused, worker.cache.passes) == (0, 0)
    worker.evaluate([TASK.prompt], [1])
    assert worker.cache.reused == worker.cache.passes - 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.reuse_below=0.1",), "set sampler.sde_window"),
        (("evaluation.reuse_below=0.1", "rollout.compile=true"), "goes without rollout.compile"),
        (("rollout.reuse_below=0",), "greater than 0"),
    ],
)
def test_reuse_that_cannot_be_is_refused(make_config: MakeConfig, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_a_seed_means_the_same_group_and_guidance_changes_it(make_config: MakeConfig) -> None:
    def latents(*overrides: str, seed: int = 11) -> np.ndarray:
        config = make_config(*overrides)
        worker = RolloutWorker(config, CPU)
        source = Local(PrmScorer(config, CPU)) if config.rewards.process else None
        return worker.generate(GroupTask(group_id=0, prompt=TASK.prompt, seed=seed), source)[1]

    guided = latents()
    np.testing.assert_array_equal(guided, latents())
    assert not np.allclose(guided, latents(seed=12))
    unguided = latents("sampler.guidance=null", "rewards.process=null")
    assert not np.allclose(guided, unguided)
    np.testing.assert_allclose(latents("sampler.guidance.scale=0.0"), unguided, atol=1e-6)


def test_weights_are_taken_over_with_their_version(make_config: MakeConfig) -> None:
    worker = RolloutWorker(make_config(), CPU)
    before = worker.evaluate([TASK.prompt], [1])
    changed = {name: p + 0.01 for name, p in worker.transformer.named_parameters()}
    bucket, description = pack(changed)
    worker.load_weights(7, unpack(description, bucket))
    assert worker.policy_version == 7
    for name, p in worker.transformer.named_parameters():
        assert torch.equal(p, changed[name])
    assert not np.allclose(before, worker.evaluate([TASK.prompt], [1]))


def test_prm_gradient_equals_finite_differences_and_autograd(make_config: MakeConfig, tiny_prm: Path) -> None:
    config = make_config()
    scorer = PrmScorer(config, CPU)
    worker = RolloutWorker(config, CPU)
    prompt = worker.conditioning(TASK.prompt)
    x = torch.randn(3, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    rewards, gradient = scorer.reward_and_gradient(x.numpy(), 0.6, {n: t.numpy() for n, t in prompt.items()}, True)
    assert gradient is not None
    model = ProcessRewardModel.load(tiny_prm, config.model)
    leaf = x.clone().requires_grad_(True)
    expanded = {n: t.expand(3, *t.shape[1:]) for n, t in prompt.items()}
    direct = model(leaf, torch.full((3,), 0.6), expanded)
    direct.sum().backward()
    torch.testing.assert_close(torch.tensor(rewards), direct.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(gradient), leaf.grad, atol=1e-6, rtol=0)
    assert float(torch.tensor(gradient).abs().max()) > 0


def test_evaluation_samples_do_not_depend_on_their_batch(make_config: MakeConfig) -> None:
    worker = RolloutWorker(make_config(), CPU)
    prompts = [TASK.prompt, "a blue fish moving up on a gray background"]
    together = worker.evaluate(prompts, [3, 4])
    np.testing.assert_allclose(together[1:], worker.evaluate(prompts[1:], [4]), atol=1e-5)
