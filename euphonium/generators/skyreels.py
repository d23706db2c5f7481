"""SkyReels V1: image-to-video on HunyuanVideo's transformer, the model of DanceGRPO's image-to-video runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from euphonium.generators.conditioning import IMAGE, Conditioning, ImageEncoder
from euphonium.generators.hunyuan_video import HunyuanVideo
from euphonium.generators.pictures import open_picture


class SkyReelsImageToVideo(HunyuanVideo):
    """Adapter of ``HunyuanSkyreelsImageToVideoPipeline``.

    The transformer's input is the state, concatenated with the latents of the first frame and zeros for the others.
    """

    pipeline_class = "HunyuanSkyreelsImageToVideoPipeline"
    takes_image = True

    @override
    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """Latents are the mode of the VAE's distribution; the pipeline samples from it instead."""
        from diffusers.video_processor import VideoProcessor

        vae = self.load_working_vae(device)
        processor = VideoProcessor(vae_scale_factor=self.compression[1], do_normalize=False)
        size = {"height": self.config.height, "width": self.config.width}

        def encode(files: Sequence[Path]) -> Conditioning:
            pictures = [processor.preprocess(open_picture(file), **size) for file in files]
            return {IMAGE: torch.cat([vae.encode(picture.unsqueeze(1)) for picture in pictures])}

        return encode

    @override
    def network_input(self, x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        first = arguments.pop(IMAGE).to(x.dtype)
        return torch.cat([x, functional.pad(first, (0, 0, 0, 0, 0, x.shape[2] - 1))], dim=1)
