"""Stage 1 of the embedded generator: a small LTX video VAE over clips of the sprite world.

``AutoencoderKLHunyuanVideo``, in the smallest useful size (16, 16, 96 channels), decodes a clip of 9x32x32 pixels in
17 ms on one core and reaches 20.6 dB after five minutes of training; ``AutoencoderKLLTXVideo``, which works on 4x4
patches, takes 3 ms and reaches 25.8 dB. The HunyuanVideo pipeline runs with either.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from euphonium.embedded.sprites import split_scenes
from euphonium.embedded.sprites.render import render

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTXVideo

log = logging.getLogger(__name__)

LATENT_CHANNELS = 16
CHANNELS = 64
BATCH = 8
PEAK_LEARNING_RATE = 1e-3
KL_WEIGHT = 1e-4
# The sprite covers a tenth of the picture; unweighted, training spends itself on plain backgrounds.
FOREGROUND_WEIGHT = 5.0


def build_vae() -> AutoencoderKLLTXVideo:
    """A fresh VAE: 9x32x32 RGB clips to 16x5x4x4 latents."""
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(CHANNELS,),
        decoder_block_out_channels=(CHANNELS,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        down_block_types=("LTXVideoDownBlock3D",),
        decoder_inject_noise=(False, False),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )


def train_vae(steps: int, seed: int = 0) -> AutoencoderKLLTXVideo:
    """Trains the VAE and sets its ``scaling_factor`` so that latents have unit variance.

    Args:
        steps: optimiser steps of ``BATCH`` clips; the learning rate falls linearly to zero over them.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    vae = build_vae()
    data = torch.Generator().manual_seed(seed)
    scenes, _ = split_scenes()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0)
    started = time.monotonic()
    for step in range(steps):
        rate = PEAK_LEARNING_RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(scenes), (BATCH,), generator=data).tolist()
        pixels = render([scenes[i] for i in chosen], data)
        weight = _foreground_weight(pixels)
        clips = pixels.transpose(1, 2) * 2 - 1
        posterior = vae.encode(clips).latent_dist
        latents = posterior.sample(data)
        decoded = vae.decode(latents).sample
        difference = decoded - clips
        reconstruction = weight * (difference.abs() + difference.square())
        loss = reconstruction.mean() + KL_WEIGHT * posterior.kl().sum() / latents.numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            mse = functional.mse_loss(decoded.detach(), clips).item() / 4
            log.info(
                "vae step %d/%d: loss %.4f, psnr %.1f dB, latent std %.2f, %.0f s",
                step + 1, steps, loss.item(), -10 * torch.log10(torch.tensor(mse)).item(),
                latents.std().item(), time.monotonic() - started,
            )  # fmt: skip
    clips = render(scenes, data).transpose(1, 2) * 2 - 1
    with torch.no_grad():
        std = torch.cat([vae.encode(part).latent_dist.mode() for part in clips.split(32)]).std().item()
    vae.register_to_config(scaling_factor=1 / std)
    return vae


def _foreground_weight(pixels: Tensor) -> Tensor:
    """Weight of every pixel ``[batch, 1, frames, height, width]``; the first pixel of a clip is background."""
    foreground = (pixels - pixels[:, :1, :, :1, :1]).abs().amax(dim=2, keepdim=True) > 0.03
    return torch.where(foreground, FOREGROUND_WEIGHT, 1.0).transpose(1, 2)


def psnr(vae: AutoencoderKLLTXVideo, clips: Tensor) -> float:
    """Reconstruction quality in dB over clips ``[batch, frames, 3, height, width]`` in [0, 1]."""
    pixels = clips.transpose(1, 2) * 2 - 1
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pixels.split(32)])
    mse = functional.mse_loss(decoded.clamp(-1, 1), pixels).item() / 4
    return float(-10 * torch.log10(torch.tensor(mse)))


def save_vae(vae: AutoencoderKLLTXVideo, folder: Path) -> None:
    """Writes the VAE as a diffusers folder."""
    vae.save_pretrained(folder, safe_serialization=True)
