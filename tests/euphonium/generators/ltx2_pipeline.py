"""What the tests tell LTX-2's own pipeline, and how they read its answer as states of ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from euphonium.generators.ltx2 import Ltx2


def ltx2_start(family: Ltx2, pipeline: Any, states: Tensor) -> dict[str, Any]:
    """Arguments of the pipeline's call for the noise in some states, with no more than classifier-free guidance.

    It takes the scale of the video for the sound too where that has none of its own.
    """
    video, sound = family.layout.split(states)
    of_sound = dict.fromkeys(("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale"))
    return {
        "latents": pipeline._pack_latents(video),
        # It takes them for latents of the audio VAE, in their scale.
        "audio_latents": pipeline._denormalize_audio_latents(sound.transpose(1, 2), *_numbers(pipeline.audio_vae)),
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        **{f"audio_{name}": value for name, value in of_sound.items()},
    }


def ltx2_states(family: Ltx2, pipeline: Any, output: Any) -> Tensor:
    """The states that the pipeline's latents of video and sound make together."""
    vae = pipeline.vae
    video = pipeline._normalize_latents(output.frames, *_numbers(vae), vae.config.scaling_factor)
    packed = pipeline._pack_audio_latents(output.audio)
    sound = pipeline._normalize_audio_latents(packed, *_numbers(pipeline.audio_vae))
    return family.layout.join(video, sound.transpose(1, 2))


def _numbers(vae: Any) -> tuple[Tensor, Tensor]:
    return vae.latents_mean, vae.latents_std
