"""Bradley-Terry training of process reward models on ranked samples (Euphonium, Eq. 13)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from core.config import PrmOptimizerConfig
from models.generators.base import Conditioning
from models.rewards.prm import ProcessRewardModel

TENTHS = 10


@dataclass(frozen=True, kw_only=True)
class RankedSamples:
    """Finished samples with the scores that rank them.

    Attributes:
        latents: float32 ``[samples, *latent]``.
        prompt: int64 ``[samples]``, index of each sample's prompt.
        score: float64 ``[samples]``.
        conditioning: per prompt, stacked to one batch.
    """

    latents: Tensor
    prompt: NDArray[np.int64]
    score: NDArray[np.float64]
    conditioning: Conditioning

    def pairs(self, margin: float) -> NDArray[np.int64]:
        """All (winner, loser) pairs of samples of one prompt whose scores differ by at least ``margin``."""
        found = []
        for prompt in np.unique(self.prompt):
            members = np.flatnonzero(self.prompt == prompt)
            gap = self.score[members][:, None] - self.score[members][None, :]
            winners, losers = np.nonzero((gap >= margin) & (gap > 0))
            found.append(np.stack([members[winners], members[losers]], axis=1))
        return np.concatenate(found)


def paired_rewards(
    model: ProcessRewardModel, data: RankedSamples, pairs: NDArray[np.int64], sigma: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Rewards of winners and losers, each pair under one noise level and one noise.

    Args:
        model: to score with.
        data: samples.
        pairs: ``[batch, 2]``.
        sigma: float32 ``[batch]``.
        noise: float32 ``[batch, *latent]``.

    Returns:
        ``[batch]`` each.
    """
    clean = torch.cat([data.latents[pairs[:, 0]], data.latents[pairs[:, 1]]])
    sigmas, noises = sigma.repeat(2), noise.repeat(2, *[1] * (noise.dim() - 1))
    noisy = torch.lerp(clean, noises, sigmas.view(-1, *[1] * (clean.dim() - 1)))
    prompts = torch.from_numpy(data.prompt[pairs[:, 0]]).repeat(2)
    rewards: Tensor = model(noisy, sigmas, {name: t[prompts] for name, t in data.conditioning.items()})
    winners, losers = rewards.chunk(2)
    return winners, losers


def bradley_terry(winners: Tensor, losers: Tensor) -> Tensor:
    """``-log sigmoid(r_w - r_l)``, averaged (Eq. 13)."""
    return -functional.logsigmoid(winners - losers).mean()


@torch.no_grad()
def accuracy_by_noise(
    model: ProcessRewardModel, data: RankedSamples, pairs: NDArray[np.int64], *, per_tenth: int, seed: int = 0
) -> list[float]:
    """Share of pairs ranked as the outcome rewards rank them, for every tenth of sigma (the paper's Figure 3).

    Args:
        model: to measure.
        data: held-out samples.
        pairs: from :meth:`RankedSamples.pairs`; as many as asked for are drawn anew for each tenth.
        per_tenth: pairs a tenth.
        seed: of pairs, noise levels and noise.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    result = []
    for tenth in range(TENTHS):
        right = 0
        chosen = pairs[rng.choice(len(pairs), size=per_tenth, replace=per_tenth > len(pairs))]
        for part in np.array_split(chosen, max(1, per_tenth // 64)):
            sigma = (tenth + torch.rand(len(part), generator=generator)) / TENTHS
            noise = torch.randn((len(part), *data.latents.shape[1:]), generator=generator)
            winners, losers = paired_rewards(model, data, part, sigma, noise)
            right += int((winners > losers).sum())
        result.append(right / per_tenth)
    return result


def train_preference(
    model: ProcessRewardModel,
    data: RankedSamples,
    settings: PrmOptimizerConfig,
    *,
    margin: float,
    seed: int,
    report: Callable[[int, float, ProcessRewardModel], None],
) -> ProcessRewardModel:
    """Trains a model on pairs drawn from ranked samples, prompts equally often.

    Args:
        model: trained in place.
        data: training samples.
        settings: of the optimisation.
        margin: see :meth:`RankedSamples.pairs`.
        seed: of pairs and noise.
        report: called with update, mean loss since the last call and the averaged model, every
            ``settings.evaluate_every`` updates.

    Returns:
        The averaged model.
    """
    pairs = data.pairs(margin)
    by_prompt = [pairs[data.prompt[pairs[:, 0]] == prompt] for prompt in np.unique(data.prompt[pairs[:, 0]])]
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parameters: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    warmup = max(1, settings.updates // 20)
    losses = []
    model.train()
    for update in range(settings.updates):
        progress = update / settings.updates
        rate = min((update + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        prompts = rng.integers(len(by_prompt), size=settings.pairs_per_update)
        batch = np.stack([by_prompt[p][rng.integers(len(by_prompt[p]))] for p in prompts])
        sigma = torch.rand(len(batch), generator=generator)
        noise = torch.randn((len(batch), *data.latents.shape[1:]), generator=generator)
        loss = bradley_terry(*paired_rewards(model, data, batch, sigma, noise))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        decay = min(settings.ema_decay, (update + 1) / (update + 10))
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        losses.append(loss.item())
        if (update + 1) % settings.evaluate_every == 0 or update + 1 == settings.updates:
            report(update + 1, float(np.mean(losses)), average)
            losses.clear()
    return average
