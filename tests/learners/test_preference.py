from collections.abc import Callable

import numpy as np
import torch

from core.config import PrmOptimizerConfig, RunConfig
from learners.preference import RankedSamples, accuracy_by_noise, bradley_terry, paired_rewards, train_preference
from models.generators.base import open_generator
from models.rewards.prm import ProcessRewardModel


def samples(count: int = 6, prompts: int = 4, seed: int = 0) -> RankedSamples:
    """Latents whose score is the mean of one channel: something that a model can learn in seconds."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count * prompts, 16, 5, 4, 4, generator=generator)
    latents[:, 3] += 2 * torch.randn(count * prompts, 1, 1, 1, generator=generator)
    return RankedSamples(
        latents=latents,
        prompt=np.repeat(np.arange(prompts), count),
        score=latents[:, 3].mean(dim=(1, 2, 3)).double().numpy(),
        conditioning={
            "encoder_hidden_states": torch.randn(prompts, 9, 64, generator=generator),
            "encoder_attention_mask": torch.ones(prompts, 9),
            "pooled_projections": torch.randn(prompts, 64, generator=generator),
        },
    )


def test_pairs_are_of_one_prompt_and_a_margin_apart() -> None:
    data = samples()
    pairs = data.pairs(0.5)
    assert len(pairs) > 0
    assert (data.prompt[pairs[:, 0]] == data.prompt[pairs[:, 1]]).all()
    assert (data.score[pairs[:, 0]] - data.score[pairs[:, 1]] >= 0.5).all()
    assert len(data.pairs(0.0)) == 4 * 6 * 5 / 2


def test_loss_falls_with_the_gap() -> None:
    gaps = torch.tensor([-2.0, 0.0, 2.0])
    losses = [float(bradley_terry(g[None], torch.zeros(1))) for g in gaps]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(losses[1], np.log(2), rtol=1e-6)


def test_both_of_a_pair_see_one_noise_level_and_one_noise(make_config: Callable[..., RunConfig]) -> None:
    data = samples()
    model = ProcessRewardModel.from_generator(open_generator(make_config().model), blocks=2)
    same = np.array([[3, 3], [8, 8]])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 16, 5, 4, 4, generator=generator)
    winners, losers = paired_rewards(model, data, same, torch.tensor([0.3, 0.9]), noise)
    torch.testing.assert_close(winners, losers)


def test_training_learns_to_rank_noisy_latents(make_config: Callable[..., RunConfig]) -> None:
    torch.manual_seed(0)
    model = ProcessRewardModel.from_generator(open_generator(make_config().model), blocks=1)
    train, held_out = samples(12, 6), samples(12, 6, seed=1)
    settings = PrmOptimizerConfig(
        updates=120, pairs_per_update=16, learning_rate=1e-3, ema_decay=0.9, evaluate_every=60
    )
    before = accuracy_by_noise(model, held_out, held_out.pairs(0.3), per_tenth=128)
    reported: list[int] = []
    average = train_preference(
        model, train, settings, margin=0.3, seed=0, report=lambda update, *_: reported.append(update)
    )
    accuracy = accuracy_by_noise(average, held_out, held_out.pairs(0.3), per_tenth=128)
    assert reported == [60, 120]
    assert min(accuracy[:4]) > 0.85
    assert min(before[:4]) < 0.75
