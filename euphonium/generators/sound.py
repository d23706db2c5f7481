"""The sound of samples, for generators that draw it with the video."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from euphonium.files import written_aside


@dataclass(frozen=True)
class Sound:
    """A sound.

    Attributes:
        samples: float32 ``[channels, length]``, values in [-1, 1].
        rate: samples a second.
    """

    samples: Tensor
    rate: int

    def save(self, path: Path) -> None:
        """Writes it as a WAV file of 16 bits, at once as a whole; what is beyond [-1, 1] is cut off."""
        levels = (self.samples.detach().float().cpu().clamp(-1, 1) * np.iinfo(np.int16).max).round()
        with written_aside(path) as aside, wave.open(str(aside), "wb") as file:
            file.setnchannels(len(levels))
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(levels.T.contiguous().to(torch.int16).numpy().astype("<i2").tobytes())


# Decodes the sound of one finished sample ``[1, *latent]``.
SoundDecoder = Callable[[Tensor], Sound]
