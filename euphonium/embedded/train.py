"""Trains the embedded default generator from nothing: ``python -m euphonium.embedded.train``.

Three stages, each resumable from its result: a video VAE; a HunyuanVideo transformer together with its text encoders
by flow matching on captioned clips; and the transformer alone, to the end, on clips whose captions are often wrong, as
captions from the web are. Its clips are clean, and often show something else than they were asked for, which leaves
reinforcement learning something to do. Held-out combinations (sprites/world.py) are never shown.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from euphonium.dynamics import noised, shift_sigma
from euphonium.embedded import WEIGHTS
from euphonium.embedded.sprites import split_scenes
from euphonium.embedded.sprites.captions import WrongCaptions
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
LEARNING_RATE = 7e-4
WARMUP = 200
EMA_DECAY = 0.999
# Share of samples trained without a caption, so that classifier-free guidance is possible.
UNCONDITIONAL = 0.1
TRAINED = ("transformer", "text_encoder", "text_encoder_2")


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


class _Clips:
    """Rendered clips of the scenes that training may see, as latents, and the order in which they are drawn."""

    def __init__(self, pipeline: HunyuanVideoPipeline, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scenes, _ = split_scenes()
        self.drawn = torch.randint(len(self.scenes), (POOL,), generator=self.generator)
        clips = (render([self.scenes[i] for i in part.tolist()], self.generator) for part in self.drawn.split(256))
        self.latents = torch.cat([encode_clips(pipeline.vae, part) for part in clips])
        self.captions = WrongCaptions(self.scenes)
        log.info("encoded %d clips", len(self.latents))

    def batch(self, right_captions: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean latents, noise, sigma and the captions' numbers of one batch; the last number is no caption."""
        chosen = torch.randint(POOL, (BATCH,), generator=self.generator)
        clean = self.latents[chosen]
        captions = self.drawn[chosen]
        if not right_captions:
            captions = self.captions.draw(captions, self.generator)
        without = torch.rand(BATCH, generator=self.generator) < UNCONDITIONAL
        noise = torch.randn(clean.shape, generator=self.generator)
        sigma = shift_sigma(torch.rand(BATCH, generator=self.generator), SHIFT)
        return clean, noise, sigma, captions.masked_fill(without, len(self.scenes))


class _Averaged:
    """AdamW over some modules, and the running average of their weights, which is what training ends with."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.averaged = [copy.deepcopy(module).requires_grad_(False) for module in modules]
        self.parameters: list[Tensor] = [p for module in modules for p in module.parameters()]
        self.averages: list[Tensor] = [p for module in self.averaged for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0

    def update(self, loss: Tensor, learning_rate: float) -> None:
        """One optimiser step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (self.step + 1) / WARMUP)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.parameters, 1 - min(EMA_DECAY, (self.step + 1) / (self.step + 10)))
        self.step += 1

    def finish(self) -> None:
        """Puts the averaged weights in place."""
        for module, averaged in zip(self.modules, self.averaged, strict=True):
            module.load_state_dict(averaged.state_dict())

    def state(self) -> dict[str, object]:
        """Everything that :meth:`restore` needs to go on."""
        modules = [module.state_dict() for module in (*self.modules, *self.averaged)]
        return {"modules": modules, "optimizer": self.optimizer.state_dict(), "step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state` was taken."""
        for module, weights in zip((*self.modules, *self.averaged), state["modules"], strict=True):
            module.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _velocity_loss(
    transformer: Callable[..., tuple[Tensor]], clean: Tensor, noise: Tensor, sigma: Tensor, text: dict[str, Tensor]
) -> Tensor:
    velocity = transformer(hidden_states=noised(clean, noise, sigma), timestep=1000 * sigma, return_dict=False, **text)[
        0
    ]
    return functional.mse_loss(velocity, noise - clean)


def learn_words(pipeline: HunyuanVideoPipeline, steps: int, seed: int = 0) -> None:
    """Trains transformer and text encoders in place by flow matching on clips with their right captions.

    Args:
        pipeline: from :func:`build_pipeline`.
        steps: optimiser steps of ``BATCH`` clips.
        seed: of data and noise.
    """
    data = _Clips(pipeline, seed)
    text = _TextInputs(pipeline, [*(scene.caption for scene in data.scenes), ""])
    training = _Averaged([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    progress = _Progress("words", steps)
    while training.step < steps:
        clean, noise, sigma, captions = data.batch(right_captions=True)
        loss = _velocity_loss(pipeline.transformer, clean, noise, sigma, text.encode(captions))
        training.update(loss, LEARNING_RATE)
        progress.report(training.step, loss)
    training.finish()


def learn_to_disobey(
    pipeline: HunyuanVideoPipeline, steps: int, work: Path, *, compiled: bool = False, seed: int = 1
) -> None:
    """Trains the transformer in place on clips whose captions are often wrong, to the end.

    The learning rate falls to zero, so that clips are clean; what they show is a draw from what a caption means here
    (:data:`~euphonium.embedded.sprites.captions.RIGHT`). The text encoders stay as they are. A killed training
    goes on from its last thousand steps.

    Args:
        pipeline: from :func:`learn_words`.
        steps: optimiser steps of ``BATCH`` clips.
        work: folder of intermediate results.
        compiled: whether the transformer is compiled first, which takes a C++ compiler and saves a quarter of the time.
        seed: of data and noise.
    """
    data = _Clips(pipeline, seed)
    text = _TextInputs(pipeline, [*(scene.caption for scene in data.scenes), ""])
    with torch.no_grad():
        encoded = text.encode(torch.arange(len(data.scenes) + 1))
    training = _Averaged([pipeline.transformer])
    kept = work / "disobedient.pt"
    if kept.exists():
        state = torch.load(kept)
        training.restore(state)
        data.generator.set_state(state["generator"])
    transformer = torch.compile(pipeline.transformer) if compiled else pipeline.transformer
    progress = _Progress("generator", steps)
    while training.step < steps:
        clean, noise, sigma, captions = data.batch(right_captions=False)
        chosen = {name: value[captions] for name, value in encoded.items()}
        loss = _velocity_loss(transformer, clean, noise, sigma, chosen)
        training.update(loss, LEARNING_RATE * (1 - training.step / steps))
        progress.report(training.step, loss)
        if training.step % 1000 == 0:
            torch.save({**training.state(), "generator": data.generator.get_state()}, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
    training.finish()


class _Progress:
    """A line every hundred steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.started, self.running = time.monotonic(), 0.0

    def report(self, step: int, loss: Tensor) -> None:
        """Takes the loss of one step."""
        self.running += loss.item() / 100
        if step % 100 == 0:
            seconds = time.monotonic() - self.started
            log.info("%s step %d/%d: loss %.4f, %.0f s", self.name, step, self.steps, self.running, seconds)
            self.running = 0.0


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
    parser.add_argument("--word-steps", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the transformer; needs a C++ compiler")
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
    words = arguments.work / "words.pt"
    if not words.exists():
        learn_words(pipeline, arguments.word_steps)
        torch.save({name: getattr(pipeline, name).state_dict() for name in TRAINED}, words)
    for name, weights in torch.load(words).items():
        getattr(pipeline, name).load_state_dict(weights)
    learn_to_disobey(pipeline, arguments.steps, arguments.work, compiled=arguments.compile)
    save_pipeline(pipeline, arguments.output)
    log.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
