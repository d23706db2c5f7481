"""Bradley-Terry training of process reward models on preferences (Euphonium, Eq. 13), and their accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from euphonium.config import RewardOptimizerConfig
from euphonium.dynamics import noised
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import Conditioning
from learners.engine.engine import Engine
from learners.rewards.preference_files import Pairs
from learners.rewards.training import Measurement, PromptwiseItems, shared_passes

TENTHS = 10
BINS = 10
# Pairs in one forward pass of a measurement.
EVALUATION_BATCH = 64


class Latents(Protocol):
    """Clean latents by index: a tensor, possibly memory-mapped, or :class:`LatentFiles`."""

    def __getitem__(self, chosen: NDArray[np.int64]) -> Tensor:
        """float32 ``[chosen, *latent]``."""
        ...


class LatentFiles:
    """Latents in one file each, read when they are indexed."""

    def __init__(self, files: Sequence[Path], shape: tuple[int, ...]) -> None:
        self.files = files
        self.shape = shape

    def __getitem__(self, chosen: NDArray[np.int64]) -> Tensor:
        return torch.stack([read_latent(self.files[i], self.shape) for i in chosen])


def read_latent(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Reads one clean latent, float32, in the scale of the generator's samples (not the VAE's own).

    Args:
        path: ``.npy`` file, or ``.safetensors`` with one tensor.
        shape: shape of the generator's latents.

    Raises:
        ConfigError: another shape, several tensors, or values that are not finite.
    """
    if path.suffix == ".npy":
        latent = torch.from_numpy(np.load(path, allow_pickle=False))
    else:
        from safetensors.torch import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ConfigError(
                f"{path}: holds {len(tensors)} tensors ({', '.join(sorted(tensors)[:4])}); a latent is one"
            )
        (latent,) = tensors.values()
    if latent.shape == (1, *shape):
        latent = latent[0]
    if latent.shape != shape:
        raise ConfigError(
            f"{path}: a latent of shape {tuple(latent.shape)}; the generator's is {shape} [channels, frames, height, "
            "width] at the recipe's model.frames, model.height and model.width"
        )
    latent = latent.float()
    if not bool(torch.isfinite(latent).all()):
        raise ConfigError(f"{path}: a latent with values that are not finite")
    return latent


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Pairs of finished samples.

    Attributes:
        latents: latents of the samples.
        latent_shape: shape of one latent.
        prompt: int64 ``[samples]``, index of each sample's prompt.
        conditioning: conditioning of all prompts, as one batch.
        pairs: int64 ``[pairs, 2]``, winner and loser, both of one prompt.
    """

    latents: Latents
    latent_shape: tuple[int, ...]
    prompt: NDArray[np.int64]
    conditioning: Conditioning
    pairs: Pairs


def paired_rewards(
    model: nn.Module, data: Preferences, pairs: Pairs, sigma: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Rewards of winners and losers, both noised with the same noise level and the same noise.

    Args:
        model: a process reward model, or the engine around one.
        data: the samples.
        pairs: ``[batch, 2]``.
        sigma: noise levels, float32 ``[batch]``, on the model's device.
        noise: float32 ``[batch, *latent]``, on the model's device.

    Returns:
        Winners' and losers' rewards, ``[batch]`` each.
    """
    device = sigma.device
    clean = torch.cat([data.latents[pairs[:, 0]], data.latents[pairs[:, 1]]]).to(device)
    sigmas, noises = sigma.repeat(2), noise.repeat(2, *[1] * (noise.dim() - 1))
    noisy = noised(clean, noises, sigmas)
    prompts = torch.from_numpy(data.prompt[pairs[:, 0]]).repeat(2)
    rewards: Tensor = model(noisy, sigmas, {name: t[prompts].to(device) for name, t in data.conditioning.items()})
    winners, losers = rewards.chunk(2)
    return winners, losers


def bradley_terry(winners: Tensor, losers: Tensor) -> Tensor:
    """The Bradley-Terry loss ``-log sigmoid(r_w - r_l)`` of each pair (Eq. 13)."""
    return -functional.logsigmoid(winners - losers)


# Pairs, noise levels and noises of a batch.
Drawn = tuple[Pairs, Tensor, Tensor]


class PairSampler:
    """Draws batches of pairs, with all prompts equally likely, and a noise level and noise for each pair.

    A batch depends only on the seed and its number.
    """

    def __init__(self, data: Preferences, count: int, seed: int) -> None:
        """Creates a sampler.

        Args:
            data: preferences to draw from.
            count: number of pairs in a batch.
            seed: seed of pairs, noise levels and noise.
        """
        self.data, self.count, self.seed = data, count, seed
        self._pairs = PromptwiseItems(data.pairs, data.prompt[data.pairs[:, 0]])

    def draw(self, number: int) -> Drawn:
        """Pairs ``[count, 2]``, noise fractions ``[count]`` (uniform on [0, 1]) and noises ``[count, *latent]``."""
        sequence = np.random.SeedSequence([self.seed, number])
        rng = np.random.default_rng(sequence)
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        pairs = self._pairs.draw(self.count, rng)
        sigma = torch.rand(self.count, generator=generator)
        noise = torch.randn((self.count, *self.data.latent_shape), generator=generator)
        return pairs, sigma, noise


class PairObjective:
    """The Bradley-Terry loss of a process reward model; implements :class:`learners.rewards.training.Objective`.

    Args:
        data: preferences to draw from.
        count: number of pairs in a batch.
        seed: seed of pairs, noise levels and noise.
        device: device of the model.
        first: number of the batch that update 0 takes.
    """

    def __init__(self, data: Preferences, count: int, seed: int, device: torch.device, first: int = 0) -> None:
        self.device = device
        self._first = first
        self._sampler = PairSampler(data, count, seed)

    def batch(self, update: int) -> Drawn:
        """The batch of an update, as :meth:`PairSampler.draw` gives it."""
        return self._sampler.draw(self._first + update)

    def losses(self, model: nn.Module, batch: Drawn, part: slice) -> Tensor:
        """Losses of some pairs of a batch, ``[pairs]``."""
        pairs, sigma, noise = batch
        rewards = paired_rewards(
            model, self._sampler.data, pairs[part], sigma[part].to(self.device), noise[part].to(self.device)
        )
        return bradley_terry(*rewards)


class PrmTask(PairObjective):
    """Training and measurement of a process reward model; implements :class:`learners.rewards.training.Task`."""

    def __init__(
        self, train: Preferences, held_out: Preferences, settings: RewardOptimizerConfig, seed: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        for part, data in (("training", train), ("held-out", held_out)):
            if not len(data.pairs):
                raise ConfigError(
                    f"the {part} preferences hold no pair: no prompt has a better and a worse sample (with drawn "
                    "samples, lower pairs.margin or raise the samples a prompt)"
                )
        super().__init__(train, settings.pairs_per_update, seed, device)
        self.held_out = held_out

    def evaluate(self, engine: Engine, pairs: int) -> Measurement:
        """Accuracy and calibration error for each tenth of sigma, on ``pairs`` held-out pairs each."""
        return measured(gaps_by_noise(engine, self.held_out, self.held_out.pairs, per_tenth=pairs))


def gaps_by_noise(
    engine: Engine, data: Preferences, pairs: Pairs, *, per_tenth: int, seed: int = 0
) -> NDArray[np.float64]:
    """Reward differences ``r_w - r_l`` of held-out pairs, for each tenth of sigma; the ranks share the work.

    Args:
        engine: engine of the model that is measured, with its present weights.
        data: held-out samples.
        pairs: pairs to draw from, anew for each tenth, with replacement if there are too few.
        per_tenth: number of pairs for each tenth.
        seed: seed of pairs, noise levels and noise.

    Returns:
        ``[TENTHS, per_tenth]``, the same on every rank.
    """
    gaps = torch.zeros(TENTHS, per_tenth, dtype=torch.float64)
    parts = [(t, low) for t in range(TENTHS) for low in range(0, per_tenth, EVALUATION_BATCH)]
    for number, counts in shared_passes(engine, len(parts)):
        tenth, low = parts[number]
        rng = np.random.default_rng([seed, tenth])
        chosen = pairs[rng.choice(len(pairs), size=per_tenth, replace=per_tenth > len(pairs))]
        chosen = chosen[low : low + EVALUATION_BATCH]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + tenth * 10_007 + low)
        sigma = (tenth + torch.rand(len(chosen), generator=generator)) / TENTHS
        noise = torch.randn((len(chosen), *data.latent_shape), generator=generator)
        with torch.no_grad():
            winners, losers = paired_rewards(
                engine.model, data, chosen, sigma.to(engine.device), noise.to(engine.device)
            )
        if counts:
            gaps[tenth, low : low + len(chosen)] = (winners - losers).double().cpu()
    return np.asarray(engine.sum(gaps).numpy())


def measured(gaps: NDArray[np.float64]) -> Measurement:
    """Accuracy (the paper's Figure 3) and calibration error of each row of ``r_w - r_l``, ``[rows, pairs]``."""
    accuracy = accuracies(gaps)
    return {
        "accuracy": accuracy,
        "calibration_error": [calibration_error(row) for row in gaps],
        "mean_accuracy": float(np.mean(accuracy)),
        "pairs": gaps.shape[1],
    }


def accuracies(gaps: NDArray[np.float64]) -> list[float]:
    """Share of the pairs whose winner has the higher reward, for each row of ``r_w - r_l``."""
    return [float((row > 0).mean()) for row in gaps]


def calibration_error(gaps: NDArray[np.float64]) -> float:
    """Expected calibration error of ``sigmoid(r_w - r_l)`` as the probability that the winner wins.

    The order of a pair is arbitrary to the model, so predictions are folded: it predicts that the sample with the
    higher reward wins, with confidence ``sigmoid(|gap|)`` in [0.5, 1]. The error is the difference between mean
    confidence and share of right predictions, averaged over bins of confidence, weighted by the pairs in them.

    Args:
        gaps: ``r_w - r_l``, ``[pairs]``.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (gaps > 0).astype(np.float64)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
    total = 0.0
    for b in range(BINS):
        inside = bins == b
        if inside.any():
            total += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    return float(total)
