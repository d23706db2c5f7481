import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from euphonium.config import ModelConfig, RunConfig
from euphonium.errors import CheckpointError, ConfigError, TrainingError
from euphonium.files import MANIFEST
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from learners.engine.engine import Engine
from learners.engine.local import LocalEngine
from learners.rewards.preference import (
    PairSampler,
    PrmTask,
    bradley_terry,
    calibration_error,
    gaps_by_noise,
    measured,
    paired_rewards,
    read_latent,
)
from learners.rewards.preference_files import flipped_pairs, ranked_pairs
from learners.rewards.training import STATE_FILE, final_weights, fit, rate
from tests.learners.rewards.toy_preferences import CPU, Mortal, toy_preferences, toy_settings


def fresh_model(config: ModelConfig, blocks: int = 1, seed: int = 0) -> ProcessRewardModel:
    torch.manual_seed(seed)
    return ProcessRewardModel.from_generator(open_generator(config), blocks).for_training()


def test_pairs_are_of_one_prompt_and_a_margin_apart() -> None:
    rng = np.random.default_rng(0)
    prompt, score = rng.integers(4, size=24), rng.standard_normal(24)
    pairs = ranked_pairs(prompt, score, 0.5)
    assert len(pairs) > 0
    assert (prompt[pairs[:, 0]] == prompt[pairs[:, 1]]).all()
    assert (score[pairs[:, 0]] - score[pairs[:, 1]] >= 0.5).all()
    counts = np.bincount(prompt)
    assert len(ranked_pairs(prompt, score, 0.0)) == (counts * (counts - 1) / 2).sum()


def test_loss_falls_with_the_gap() -> None:
    losses = bradley_terry(torch.tensor([-2.0, 0.0, 2.0]), torch.zeros(3)).tolist()
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(losses[1], np.log(2), rtol=1e-6)


def test_both_of_a_pair_see_one_noise_level_and_one_noise(make_config: Callable[..., RunConfig]) -> None:
    model = fresh_model(make_config().model, blocks=2)
    same = np.array([[3, 3], [8, 8]])
    noise = torch.randn(2, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    winners, losers = paired_rewards(model, toy_preferences(), same, torch.tensor([0.3, 0.9]), noise)
    torch.testing.assert_close(winners, losers)
    # At pure noise nothing of the sample is left, so any two of a prompt are equal.
    other = np.array([[0, 1], [7, 8]])
    winners, losers = paired_rewards(model, toy_preferences(), other, torch.ones(2), noise)
    torch.testing.assert_close(winners, losers)


def test_batches_follow_from_seed_and_number_and_favour_no_prompt() -> None:
    data = toy_preferences(count=6, prompts=4)
    sampler = PairSampler(data, 400, seed=3)
    pairs, sigma, noise = sampler.draw(5)
    again = PairSampler(data, 400, seed=3).draw(5)
    assert (pairs == again[0]).all()
    assert torch.equal(sigma, again[1])
    assert torch.equal(noise, again[2])
    assert not torch.equal(sigma, sampler.draw(6)[1])
    shares = np.bincount(data.prompt[pairs[:, 0]]) / 400
    assert (abs(shares - 0.25) < 0.08).all()
    assert 0.4 < float(sigma.mean()) < 0.6


def test_training_learns_to_rank_noisy_latents(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train, held_out = toy_preferences(12, 6), toy_preferences(12, 6, seed=1)
    settings = toy_settings(
        updates=40, pairs_per_micro_batch=8, max_grad_norm=1.0, learning_rate=3e-3, evaluate_every=20,
        evaluation_pairs=32, checkpoint_every=1000,
    )  # fmt: skip
    # Untrained, this one ranks most pairs the wrong way round.
    engine = LocalEngine(fresh_model(make_config().model, seed=4), settings, CPU)
    before = measured(gaps_by_noise(engine, held_out, held_out.pairs, per_tenth=32))["accuracy"]
    records: list[dict[str, Any]] = []
    fit(engine, PrmTask(train, held_out, settings, 0, CPU), settings, tmp_path, "mark", records.append)
    measurements = [record for record in records if "accuracy" in record]
    assert [record["update"] for record in measurements] == [20, 40]
    assert min(measurements[-1]["accuracy"][:5]) > 0.85
    assert np.mean(before[:5]) < 0.5
    assert measurements[-1]["loss"] < 0.5


def test_killed_and_resumed_training_ends_with_the_same_weights(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    data, settings = toy_preferences(), toy_settings()
    task = PrmTask(data, data, settings, 0, CPU)

    def run(folder: Path, die_in: int | None) -> LocalEngine:
        engine = LocalEngine(fresh_model(make_config().model), settings, CPU)
        fit(engine, Mortal(task, die_in) if die_in else task, settings, folder, "mark", lambda _: None)
        return engine

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", die_in=5)
    assert [p.name for p in (tmp_path / "cut").glob("update_*")] == ["update_0000004"]
    resumed = run(tmp_path / "cut", None)
    for kind in ("weights", "average", "exp_avg", "exp_avg_sq"):
        ours, theirs = whole.whole(kind), resumed.whole(kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), kind


class Line:
    """A task of one weight: pulls it to a target, and claims accuracies of a script."""

    def __init__(self, accuracies: Sequence[float] = (), target: float = 1.0) -> None:
        self.accuracies, self.target, self.measured = list(accuracies), target, 0

    def batch(self, update: int) -> int:
        return update

    def losses(self, model: nn.Module, batch: int, part: slice) -> Tensor:
        return (model.weight - self.target).square().expand(part.stop - part.start)

    def evaluate(self, engine: Engine, pairs: int) -> dict[str, Any]:
        self.measured += 1
        return {"mean_accuracy": self.accuracies[self.measured - 1]}


def one_weight() -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1))
    return model


def test_patience_stops_and_keeps_the_best_weights(tmp_path: Path) -> None:
    settings = toy_settings(updates=100, evaluate_every=2, patience=2, learning_rate=0.1, ema_decay=0.0)
    engine = LocalEngine(one_weight(), settings, CPU)
    seen: dict[int, float] = {}
    progress = fit(
        engine, Line([0.6, 0.8, 0.7, 0.8, 0.9]), settings, tmp_path, "mark",
        lambda record: seen.setdefault(record["update"], float(engine.whole("average")["weight"])),
    )  # fmt: skip
    assert (progress.update, progress.best_update, progress.stopped) == (8, 4, True)
    weights = final_weights(engine, progress, settings, tmp_path)
    assert float(weights["weight"]) == seen[4] != seen[8]


@pytest.mark.parametrize("damaged", ["shard_00000_of_00001.safetensors", STATE_FILE, MANIFEST])
def test_checkpoints_of_another_recipe_are_refused_and_damaged_ones_skipped(
    damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = toy_settings(updates=6, evaluate_every=100)
    fit(LocalEngine(one_weight(), settings, CPU), Line([0.5]), settings, tmp_path, "mark", lambda _: None)
    with pytest.raises(CheckpointError, match="another recipe"):
        fit(LocalEngine(one_weight(), settings, CPU), Line([0.5]), settings, tmp_path, "other", lambda _: None)
    file = next(tmp_path.glob("update_*")) / damaged
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    records: list[dict[str, Any]] = []
    fit(LocalEngine(one_weight(), settings, CPU), Line([0.5]), settings, tmp_path, "mark", records.append)
    assert "damaged" in caplog.text
    assert not any("resumed" in record for record in records)


def test_checkpoints_of_another_format_are_refused(tmp_path: Path) -> None:
    settings = toy_settings(updates=2, evaluate_every=100)
    fit(LocalEngine(one_weight(), settings, CPU), Line([0.5]), settings, tmp_path, "mark", lambda _: None)
    (manifest,) = tmp_path.glob(f"update_*/{MANIFEST}")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(CheckpointError, match=r"update_0000002 has checkpoint format 1, .* another name, or remove"):
        fit(LocalEngine(one_weight(), settings, CPU), Line([0.5]), settings, tmp_path, "mark", lambda _: None)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    settings = toy_settings()
    with pytest.raises(TrainingError, match="update 1 is not finite"):
        fit(
            LocalEngine(one_weight(), settings, CPU), Line(target=float("nan")), settings, tmp_path, "m", lambda _: None
        )


def test_rate_rises_over_a_twentieth_and_falls_along_a_cosine() -> None:
    settings = toy_settings(updates=100, learning_rate=1.0)
    rates = [rate(settings, update) for update in range(100)]
    np.testing.assert_allclose(rates[:4], [0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(rates[50], 0.5)
    assert rates[99] < 1e-3


def test_calibration_error_is_zero_for_honest_confidence_and_large_for_boasting() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 200_000)
    # The winner is drawn with the very probability that the model states.
    honest = np.where(rng.random(len(logits)) < 1 / (1 + np.exp(-logits)), logits, -logits)
    assert calibration_error(honest) < 0.01
    boasting = calibration_error(5 * honest)
    assert 0.1 < boasting < 0.5
    # Certain and always wrong is as far off as it gets; a model that always says one half is honest.
    np.testing.assert_allclose(calibration_error(np.full(10, -50.0)), 1.0)
    np.testing.assert_allclose(calibration_error(np.array([1e-9, -1e-9] * 50)), 0.0, atol=1e-6)


def test_latent_files_are_checked(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shape = (2, 1, 3, 3)
    latent = torch.arange(18.0).view(shape)
    np.save(tmp_path / "a.npy", latent[None].numpy())
    save_file({"anything": latent.bfloat16()}, tmp_path / "b.safetensors")
    assert torch.equal(read_latent(tmp_path / "a.npy", shape), latent)
    assert torch.equal(read_latent(tmp_path / "b.safetensors", shape), latent)
    with pytest.raises(ConfigError, match=r"a.npy: a latent of shape .*generator's is \(2, 1, 4, 4\)"):
        read_latent(tmp_path / "a.npy", (2, 1, 4, 4))
    np.save(tmp_path / "c.npy", np.full(shape, np.inf))
    with pytest.raises(ConfigError, match="not finite"):
        read_latent(tmp_path / "c.npy", shape)
    save_file({"a": latent, "b": latent + 1}, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match="2 tensors"):
        read_latent(tmp_path / "d.safetensors", shape)


def test_float32_training_of_a_bfloat16_generator_computes_in_bfloat16(make_config: Callable[..., RunConfig]) -> None:
    model = fresh_model(make_config("model.dtype=bfloat16").model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    data = toy_preferences()
    noise = torch.randn(2, 16, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    pairs, sigma = np.array([[0, 1], [6, 7]]), torch.tensor([0.2, 0.6])
    winners, losers = paired_rewards(model, data, pairs, sigma, noise)
    exact = paired_rewards(fresh_model(make_config().model), data, pairs, sigma, noise)[0]
    assert winners.dtype == torch.float32
    assert 0 < (winners - exact).abs().max() < 0.05
    bradley_terry(winners, losers).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.head.parameters())
    assert sum(p.grad is not None for p in model.trunk.parameters()) > 20


def test_recipe_fingerprint_ignores_what_does_not_change_the_weights(tmp_path: Path) -> None:
    from euphonium.config import PrmConfig, load_config
    from learners.rewards.worker import recipe_fingerprint

    def mark(*overrides: str) -> str:
        return recipe_fingerprint(load_config("recipes/embedded/prm.yaml", overrides, PrmConfig))

    assert mark() == mark("optimizer.checkpoint_every=7", "threads=3", f"target={json.dumps(str(tmp_path))}")
    assert mark() != mark("optimizer.learning_rate=1e-3")
    assert mark() != mark("seed=1")
    assert len({mark(), mark("pairs.shift=2"), mark("pairs.grid=linear", "pairs.shift=2")}) == 3


def test_a_share_of_the_pairs_is_turned_round_always_the_same() -> None:
    pairs = np.arange(4000).reshape(-1, 2)
    turned = flipped_pairs(pairs, 0.3, seed=1)
    share = float((turned[:, 0] > turned[:, 1]).mean())
    assert abs(share - 0.3) < 0.04
    np.testing.assert_array_equal(np.sort(turned, axis=1), pairs)
    np.testing.assert_array_equal(turned, flipped_pairs(pairs, 0.3, seed=1))
