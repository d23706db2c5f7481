"""Trains the embedded default generator from nothing: ``python -m euphonium.embedded.train``.

Two stages, each resumable from its result: a video VAE, then a HunyuanVideo transformer together with its text
encoders by flow matching on captioned clips. Training stops while prompts are obeyed often but not always, which
leaves reinforcement learning something to do; held-out combinations (sprites/world.py) are never shown.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from euphonium.dynamics import noised, shift_sigma
from euphonium.embedded import WEIGHTS
from euphonium.embedded.sprites import split_scenes
from euphonium.embedded.sprites.render import render
from euphonium.embedded.text import (
    MAX_PROMPT_TOKENS,
    POOLED_DIM,
    TEXT_DIM,
    build_pooled_encoder,
    build_pooled_tokenizer,
    build_prompt_encoder,
    build_prompt_tokenizer,
)
from euphonium.embedded.train_vae import LATENT_CHANNELS, psnr, save_vae, train_vae
from euphonium.generators.vae import VideoVae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTXVideo, HunyuanVideoPipeline

log = logging.getLogger(__name__)

SHIFT = 3.0
BATCH = 32
POOL = 16_384
# Constant, so that a snapshot is what a shorter training would have ended with.
LEARNING_RATE = 7e-4
WARMUP = 200
EMA_DECAY = 0.999
# Share of samples trained without a caption, so that classifier-free guidance is possible.
UNCONDITIONAL = 0.1


def build_pipeline(vae: AutoencoderKLLTXVideo) -> HunyuanVideoPipeline:
    """A fresh ``HunyuanVideoPipeline`` in a tiny configuration around a trained VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    tokenizer, pooled_tokenizer = build_prompt_tokenizer(), build_pooled_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=build_prompt_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=2,
            num_single_layers=4,
            num_refiner_layers=1,
            guidance_embeds=False,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=POOLED_DIM,
            rope_axes_dim=(8, 12, 12),
            # The VAE's latents are already as coarse as other models' patches.
            patch_size=1,
        ),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=build_pooled_encoder(pooled_tokenizer),
        tokenizer_2=pooled_tokenizer,
    )


def encode_clips(vae: AutoencoderKLLTXVideo, clips: Tensor) -> Tensor:
    """Latents, scaled to unit variance, of clips ``[batch, frames, 3, height, width]`` in [0, 1]."""
    scaled = VideoVae(vae, clips.device, clips.dtype)
    return torch.cat([scaled.encode(part) for part in clips.split(32)])


class _TextInputs:
    """Token ids of all captions, so that the encoders see ready tensors."""

    def __init__(self, pipeline: HunyuanVideoPipeline, captions: list[str]) -> None:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        self.pipeline = pipeline
        self.crop = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
        wrapped = [str(DEFAULT_PROMPT_TEMPLATE["template"]).format(caption) for caption in captions]
        tokens = pipeline.tokenizer(
            wrapped, padding="max_length", max_length=self.crop + MAX_PROMPT_TOKENS, return_tensors="pt"
        )
        pooled = pipeline.tokenizer_2(captions, padding="max_length", max_length=77, return_tensors="pt")
        self.ids, self.mask, self.pooled_ids = tokens.input_ids, tokens.attention_mask, pooled.input_ids

    def encode(self, chosen: Tensor) -> dict[str, Tensor]:
        """Conditioning of the chosen captions, differentiable in both encoders."""
        mask = self.mask[chosen]
        length = self.crop + int(mask[:, self.crop :].sum(dim=1).max())
        hidden = self.pipeline.text_encoder(
            input_ids=self.ids[chosen, :length], attention_mask=mask[:, :length], output_hidden_states=True
        ).hidden_states[-3]
        pooled = self.pipeline.text_encoder_2(self.pooled_ids[chosen]).pooler_output
        return {
            "encoder_hidden_states": hidden[:, self.crop :],
            "encoder_attention_mask": mask[:, self.crop : length],
            "pooled_projections": pooled,
        }


def train_generator(pipeline: HunyuanVideoPipeline, steps: int, seed: int = 0, snapshots: Path | None = None) -> None:
    """Trains transformer and text encoders in place by flow matching.

    Args:
        pipeline: from :func:`build_pipeline`.
        steps: optimiser steps of ``BATCH`` clips.
        seed: of data and noise.
        snapshots: folder for averaged weights along the way, to choose where to stop.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes, _ = split_scenes()
    drawn = torch.randint(len(scenes), (POOL,), generator=generator)
    clips = (render([scenes[i] for i in part.tolist()], generator) for part in drawn.split(256))
    latents = torch.cat([encode_clips(pipeline.vae, part) for part in clips])
    log.info("encoded %d clips", len(latents))
    text = _TextInputs(pipeline, [*(scene.caption for scene in scenes), ""])
    parts = {n: getattr(pipeline, n) for n in ("transformer", "text_encoder", "text_encoder_2")}
    averaged = {name: copy.deepcopy(module).requires_grad_(False) for name, module in parts.items()}
    parameters = [p for module in parts.values() for p in module.parameters()]
    averages = [p for module in averaged.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        batch = torch.randint(POOL, (BATCH,), generator=generator)
        captions = drawn[batch].masked_fill(torch.rand(BATCH, generator=generator) < UNCONDITIONAL, len(scenes))
        clean = latents[batch]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = shift_sigma(torch.rand(BATCH, generator=generator), SHIFT)
        velocity = parts["transformer"](
            hidden_states=noised(clean, noise, sigma), timestep=1000 * sigma, return_dict=False, **text.encode(captions)
        )[0]
        loss = functional.mse_loss(velocity, noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        running += loss.item() / 100
        if (step + 1) % 100 == 0:
            log.info("generator step %d/%d: loss %.4f, %.0f s", step + 1, steps, running, time.monotonic() - started)
            running = 0.0
        if snapshots is not None and (step + 1) % 1000 == 0:
            snapshots.mkdir(parents=True, exist_ok=True)
            torch.save({n: m.state_dict() for n, m in averaged.items()}, snapshots / f"{step + 1}.pt")
    for name, module in averaged.items():
        parts[name].load_state_dict(module.state_dict())


def save_pipeline(pipeline: HunyuanVideoPipeline, folder: Path) -> None:
    """Writes the pipeline; weights in half precision, which every loader widens again."""
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        getattr(pipeline, name).to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder of the pipeline (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/embedded-generator"), help="intermediate results")
    parser.add_argument("--vae-steps", type=int, default=10_600)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(arguments.threads)

    from diffusers import AutoencoderKLLTXVideo

    vae_folder = arguments.work / "vae"
    if not vae_folder.exists():
        vae = train_vae(arguments.vae_steps)
        _, held_out = split_scenes()
        clips = render(held_out, torch.Generator().manual_seed(1))
        log.info("vae: %.1f dB on clips of held-out scenes", psnr(vae, clips))
        save_vae(vae, vae_folder)
    torch.manual_seed(0)
    pipeline = build_pipeline(AutoencoderKLLTXVideo.from_pretrained(vae_folder))
    train_generator(pipeline, arguments.steps, snapshots=arguments.work / "snapshots")
    save_pipeline(pipeline, arguments.output)
    log.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
