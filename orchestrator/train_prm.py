"""``euphonium train-prm``: draws samples, ranks them by outcome rewards, trains a process reward model on the pairs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from actors.rollout import encode_one
from actors.sampler import initial_noise, sample_deterministic
from core.config import PrmConfig
from core.records import Array
from learners.preference import TENTHS, RankedSamples, accuracy_by_noise, train_preference
from models.generators.base import images_for, open_generator, stack_conditionings
from models.rewards.prm import ProcessRewardModel
from orchestrator.prompts import read_prompts
from reward_servers.orm import OrmScorer

log = logging.getLogger(__name__)

BATCH = 32
PAIRS_PER_TENTH = 2000


def train_prm(config: PrmConfig, say: Callable[[str], None]) -> list[float]:
    """Trains a process reward model as a recipe says, and writes it to ``config.target``.

    Args:
        config: the recipe.
        say: takes progress lines.

    Returns:
        Held-out pairwise accuracy by tenth of sigma.
    """
    torch.set_num_threads(config.threads)
    pairs = config.pairs
    train = _ranked(config, "train", config.prompts.train, pairs.samples_per_prompt, say)
    held_out = _ranked(config, "held_out", config.prompts.evaluation, pairs.held_out_samples_per_prompt, say)
    held_out_pairs = held_out.pairs(pairs.margin)
    say(f"{len(train.pairs(pairs.margin))} training pairs, {len(held_out_pairs)} held-out pairs")
    torch.manual_seed(config.seed)
    model = ProcessRewardModel.from_generator(open_generator(config.model), config.blocks)
    began = time.monotonic()

    def report(update: int, loss: float, average: ProcessRewardModel) -> None:
        accuracy = accuracy_by_noise(average, held_out, held_out_pairs, per_tenth=PAIRS_PER_TENTH // 5)
        shown = " ".join(f"{a:.2f}" for a in accuracy)
        say(f"update {update}/{config.optimizer.updates}, loss {loss:.4f}, accuracy by tenth {shown}, "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip

    average = train_preference(model, train, config.optimizer, margin=pairs.margin, seed=config.seed, report=report)
    accuracy = accuracy_by_noise(average, held_out, held_out_pairs, per_tenth=PAIRS_PER_TENTH)
    every = held_out.pairs(0.0)
    without_margin = accuracy_by_noise(average, held_out, every, per_tenth=PAIRS_PER_TENTH)
    say(accuracy_table(accuracy, without_margin, pairs.margin))
    average.save(
        config.target,
        getattr(torch, config.save_dtype),
        held_out_accuracy=[round(a, 4) for a in accuracy],
        held_out_accuracy_without_margin=[round(a, 4) for a in without_margin],
        margin=pairs.margin,
    )
    (config.run_dir / "accuracy.json").write_text(json.dumps(accuracy) + "\n")
    say(f"wrote {config.target}")
    return accuracy


def accuracy_table(accuracy: Sequence[float], without_margin: Sequence[float], margin: float) -> str:
    """Accuracies by noise level, for people."""
    lines = [f"held-out pairwise accuracy   pairs {margin:g} apart   all pairs"]
    for tenth in range(TENTHS):
        span = f"sigma {tenth / TENTHS:.1f} - {(tenth + 1) / TENTHS:.1f}"
        lines.append(f"{span:<28} {accuracy[tenth]:14.1%} {without_margin[tenth]:11.1%}")
    return "\n".join(lines)


def _ranked(config: PrmConfig, part: str, prompts_file: Path, count: int, say: Callable[[str], None]) -> RankedSamples:
    """Samples of every prompt with their weighted outcome rewards; kept in the run's folder for the next time."""
    prompts = read_prompts(prompts_file, f"prompts.{part}")
    family = open_generator(config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = family.prompt_encoder(device, images_for(family, config.prompts))
    conditioning = stack_conditionings([encode_one(encoder, prompt) for prompt in prompts])
    index = np.repeat(np.arange(len(prompts)), count)
    stored = config.run_dir / f"samples_{part}.npz"
    if stored.exists():
        data = np.load(stored)
        latents, score = data["latents"], data["score"]
        if len(latents) == len(index):
            say(f"{part}: {len(latents)} samples from {stored}")
            return RankedSamples(
                latents=torch.from_numpy(latents), prompt=index, score=score, conditioning=conditioning
            )
    transformer = family.load_transformer(device).requires_grad_(False)
    scorer = OrmScorer(config.outcome, family, device)
    weights = {reward.name: reward.weight for reward in config.outcome}
    table = family.ode_table(config.pairs.num_steps, config.pairs.shift)
    parts: list[Array] = []
    scores = []
    began = time.monotonic()
    for begin in range(0, len(index), BATCH):
        chosen = index[begin : begin + BATCH]
        batch = {name: tensor[torch.from_numpy(chosen)].to(device) for name, tensor in conditioning.items()}
        seed = int(np.random.SeedSequence([config.seed, len(prompts), begin]).generate_state(1, np.uint64)[0] >> 1)
        start, _ = initial_noise(family.latent_shape, len(chosen), seed, shared=False, device=device)

        def velocity(x: torch.Tensor, time: float, batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
            return family.velocity(transformer, x, torch.full((len(x),), time, device=device), batch)

        latent = sample_deterministic(table, velocity, start).cpu().numpy()
        values = scorer.score(latent, [prompts[i] for i in chosen])
        scores.append(sum(weights[name] * v.astype(np.float64) for name, v in values.items()))
        parts.append(latent)
        if (begin // BATCH) % 50 == 49:
            say(f"{part}: {begin + len(chosen)}/{len(index)} samples, {time.monotonic() - began:.0f} s")
    latents, score = np.concatenate(parts), np.concatenate(scores) / sum(map(abs, weights.values()))
    config.run_dir.mkdir(parents=True, exist_ok=True)
    np.savez(stored, latents=latents, score=score)
    say(f"{part}: {len(latents)} samples, mean score {score.mean():.3f}, spread within a prompt "
        f"{score.reshape(len(prompts), count).std(axis=1).mean():.3f}")  # fmt: skip
    return RankedSamples(latents=torch.from_numpy(latents), prompt=index, score=score, conditioning=conditioning)
