"""The process reward model follows the policy's samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from single_process import SingleProcess

from euphonium.config import ModelConfig, PrmRefreshConfig, RunConfig
from euphonium.errors import ConfigError, TrainingError
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from learners.rewards.refresh import PrmRefresh
from reward_servers.prm import PrmScorer
from tests.learners.rewards.toy_preferences import CPU, toy_preferences

SETTINGS = PrmRefreshConfig(every=2, updates=8, pairs_per_update=8, learning_rate=3e-3, buffer_groups=4)


def fresh(config: ModelConfig, settings: PrmRefreshConfig = SETTINGS, seed: int = 0) -> PrmRefresh:
    torch.manual_seed(seed)
    return PrmRefresh(settings, ProcessRewardModel.from_generator(open_generator(config), 1), 0, CPU)


def feed(refresh: PrmRefresh, iteration: int, groups: int = 4, seed: int = 0) -> None:
    data = toy_preferences(count=8, prompts=groups, seed=seed)
    for g in range(groups):
        latents = data.latents[np.flatnonzero(data.prompt == g)]
        conditioning = {name: t[g : g + 1].numpy() for name, t in data.conditioning.items()}
        refresh.add(iteration, latents.numpy(), latents[:, 3].mean(dim=(1, 2, 3)).numpy(), conditioning)


def test_refreshes_learn_what_the_outcome_rewards_prefer(make_config: Callable[..., RunConfig]) -> None:
    # Untrained, this one ranks most pairs the wrong way round.
    refresh = fresh(make_config().model, SETTINGS.model_copy(update={"updates": 40}), seed=4)
    assert [refresh.due(i) for i in (1, 2, 3, 4)] == [False, True, False, True]
    history = []
    for iteration in range(1, 4):
        # Every refresh is judged on samples that it has not seen.
        feed(refresh, iteration, seed=iteration)
        history.append(refresh.update())
    assert history[0]["process/refresh_accuracy"] < 0.5
    assert min(later["process/refresh_accuracy"] for later in history[1:]) > 0.85
    assert refresh.version == 3


def test_every_refresh_begins_at_the_weights_of_the_start(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config().model
    refreshed, restored, later = fresh(config), fresh(config), fresh(config)
    feed(refreshed, 1)
    refreshed.update()
    refreshed.save(tmp_path)
    restored.restore(tmp_path)
    assert any((restored.weights()[name] != array).any() for name, array in later.weights().items())
    later.version = 1
    # All groups of the first refresh are gone from the replay after these.
    for refresh in (refreshed, restored, later):
        feed(refresh, 2, seed=1)
        refresh.update()
    for name, array in later.weights().items():
        assert (refreshed.weights()[name] == array).all()
        assert (restored.weights()[name] == array).all()


def test_replay_holds_the_newest_groups_alone(make_config: Callable[..., RunConfig]) -> None:
    refresh = fresh(make_config().model)
    feed(refresh, 1, groups=3)
    # Four groups of eight, no two totals alike.
    feed(refresh, 2, groups=4, seed=9)
    assert refresh.update()["process/refresh_pairs"] == 4 * 8 * 7 / 2


def test_samples_closer_than_the_margin_make_no_pair(make_config: Callable[..., RunConfig]) -> None:
    refresh = fresh(make_config().model, SETTINGS.model_copy(update={"margin": 0.25}))
    data = toy_preferences(count=4, prompts=1)
    conditioning = {name: t.numpy() for name, t in data.conditioning.items()}
    refresh.add(1, data.latents[np.arange(4)].numpy(), np.array([0.0, 0.2, 0.4, 1.0]), conditioning)
    assert refresh.update()["process/refresh_pairs"] == 4


def test_groups_without_spread_train_nothing(make_config: Callable[..., RunConfig]) -> None:
    refresh = fresh(make_config().model)
    before = refresh.weights()
    data = toy_preferences(count=4, prompts=1)
    refresh.add(1, data.latents[np.arange(4)].numpy(), np.ones(4), {n: t.numpy() for n, t in data.conditioning.items()})
    assert refresh.update() == {}
    assert refresh.version == 0
    assert all((before[name] == array).all() for name, array in refresh.weights().items())


def test_samples_that_are_not_finite_end_a_refresh_with_an_error(make_config: Callable[..., RunConfig]) -> None:
    refresh = fresh(make_config().model)
    data = toy_preferences(count=4, prompts=1)
    latents = data.latents[np.arange(4)].numpy() * np.nan
    refresh.add(1, latents, np.arange(4.0), {n: t.numpy() for n, t in data.conditioning.items()})
    with pytest.raises(TrainingError, match=r"update 1 .*lower rewards.process.refresh.learning_rate"):
        refresh.update()


def test_saved_and_restored_refresh_goes_on_as_if_nothing_had_happened(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config().model
    first = fresh(config)
    feed(first, 1)
    first.update()
    first.save(tmp_path)
    second = fresh(config)
    second.restore(tmp_path)
    results = []
    for refresh in (first, second):
        feed(refresh, 2, groups=2, seed=5)
        results.append(refresh.update())
    assert results[0] == results[1]
    ours, theirs = first.weights(), second.weights()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    # The folder is a process reward model like any other.
    assert ProcessRewardModel.load(tmp_path, config).blocks == 1


def test_servers_take_over_weights_and_their_version(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    scorer = PrmScorer(config, CPU)
    x = np.random.default_rng(0).standard_normal((2, 16, 5, 4, 4)).astype(np.float32)
    data = toy_preferences(count=2, prompts=1)
    prompt = {name: t.numpy() for name, t in data.conditioning.items()}
    old_model, (before, _) = scorer.model, scorer.reward_and_gradient(x, 0.5, prompt, False)
    assert scorer.weights_version == 0
    # A model of the same shape: two blocks, as the fixture's.
    torch.manual_seed(5)
    refresh = PrmRefresh(SETTINGS, ProcessRewardModel.from_generator(scorer.model.family, 2), 0, CPU)
    scorer.load_weights(3, refresh.weights())
    after, gradient = scorer.reward_and_gradient(x, 0.5, prompt, True)
    assert scorer.weights_version == 3
    assert gradient is not None
    refresh.model.eval()
    with torch.no_grad():
        expected = refresh.model(
            torch.from_numpy(x),
            torch.full((2,), 0.5),
            {n: t.expand(2, *t.shape[1:]) for n, t in data.conditioning.items()},
        )
    np.testing.assert_allclose(after, expected.numpy(), atol=1e-6)
    assert abs(after - before).max() > 1e-3
    # Passes that are under way keep the model they began with.
    assert scorer.model is not old_model


def test_single_process_run_refreshes_its_model(make_config: Callable[..., RunConfig]) -> None:
    refresh = ["every=2", "updates=2", "pairs_per_update=4", "learning_rate=1e-3", "buffer_groups=3"]
    overrides = [f"rewards.process.refresh.{item}" for item in refresh]
    config = make_config(
        "rollout.prompts_per_iteration=1", "sampler.num_steps=3", "sampler.guidance.window=[1,2]", *overrides
    )
    run = SingleProcess(config)
    before = {name: t.clone() for name, t in run.prm.state_dict().items()}
    first = run.iterate()
    assert "process/refresh_loss" not in first
    assert all(torch.equal(before[name], t) for name, t in run.prm.state_dict().items())
    second = run.iterate()
    assert np.isfinite(second["process/refresh_loss"])
    assert 0 <= second["process/refresh_accuracy"] <= 1
    weights = run.refresh.weights()
    assert all(np.array_equal(weights[name], t.numpy()) for name, t in run.prm.state_dict().items())
    assert max(float((before[name] - t).abs().max()) for name, t in run.prm.state_dict().items()) > 1e-4
    # The model in guidance stays frozen.
    assert not any(p.requires_grad for p in run.prm.parameters())


def test_refresh_is_off_unless_asked_for(make_config: Callable[..., RunConfig]) -> None:
    process = make_config().rewards.process
    assert process is not None
    assert process.refresh is None
    with pytest.raises(ConfigError, match=r"unknown key 'rewards.process.refresh.evry'; did you mean 'every'"):
        make_config("rewards.process.refresh.evry=2")
