"""Accuracy of text that a prompt asks for, read off the pixels by RapidOCR (PP-OCR networks on onnxruntime)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from euphonium.config import Node
from euphonium.rewards.frames import as_bytes, check_videos, spread
from euphonium.rewards.pretrained import library

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|「([^」]+)」')


def quoted_text(prompt: str) -> str:
    """What the prompt puts in double quotation marks ("", “” or 「」), several joined in their order.

    Raises:
        ValueError: nothing is quoted; shows the prompt.
    """
    found = ["".join(groups) for groups in QUOTED.findall(prompt)]
    if not any(text.strip() for text in found):
        raise ValueError(
            f"the ocr reward needs the wanted text in double quotation marks in the prompt, got {prompt!r}"
        )
    return " ".join(found)


def plain(text: str, case_sensitive: bool = False) -> str:
    """Compatibility forms and spaces removed, in lower case unless case matters."""
    text = "".join(unicodedata.normalize("NFKC", text).split())
    return text if case_sensitive else text.casefold()


def edit_distance(read: str, wanted: str, anywhere: bool = False) -> int:
    """Fewest insertions, deletions and substitutions that make ``wanted`` of ``read``.

    Args:
        read: text found.
        wanted: text asked for.
        anywhere: compare with the best matching part of ``read``; what stands before and after costs nothing.
    """
    row = list(range(len(wanted) + 1))
    best = row[-1]
    for index, letter in enumerate(read, start=1):
        previous, row = row, [0 if anywhere else index]
        for column, other in enumerate(wanted, start=1):
            row.append(min(previous[column] + 1, row[-1] + 1, previous[column - 1] + (letter != other)))
        best = min(best, row[-1])
    return best if anywhere else row[-1]


def accuracy(read: str, wanted: str, anywhere: bool = False) -> float:
    """``1 - distance / len(wanted)``, not below 0."""
    return max(0.0, 1.0 - edit_distance(read, wanted, anywhere) / len(wanted))


class OcrReward:
    """Normalised edit-distance accuracy of the text in the picture against the text quoted in the prompt."""

    class Options(Node):
        """What is read, and how it is compared."""

        frames: PositiveInt = 4
        """Frames of a video that are read, evenly spread."""
        reduce: Literal["mean", "max"] = "mean"
        """Mean over those frames, or the best of them."""
        extra_text: Literal["counted", "free"] = "counted"
        """Whether other text in the picture counts as errors, or is free."""
        case_sensitive: bool = False
        """Tell capital and small letters apart."""
        min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Lines that the network is less sure of are not read."""
        side: Annotated[int, Field(ge=32)] = 736
        """Larger pictures are scaled down to this longer side before text is searched; smaller ones are searched as
        they are."""
        threads: PositiveInt = 1
        """CPU threads."""

    def __init__(self, options: Options) -> None:
        """Loads the two networks that the package brings along.

        Raises:
            ConfigError: RapidOCR or onnxruntime is not installed.
        """
        self.options = options
        library("onnxruntime", "ocr")
        self._engine = library("rapidocr", "ocr").RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.log_level": "error",
                "Global.text_score": options.min_confidence,
                "Det.limit_type": "max",
                "Det.limit_side_len": options.side,
                "EngineConfig.onnxruntime.intra_op_num_threads": options.threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, picture: NDArray[np.uint8]) -> str:
        """Text of an RGB picture, uint8 ``[height, width, 3]``, line by line."""
        found = self._engine(picture[..., ::-1].copy())
        return " ".join(found.txts or ())

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]`` in [0, 1]; 1 if every letter is right.

        Raises:
            ValueError: a prompt without quoted text.
        """
        check_videos(videos, prompts)
        options = self.options
        chosen, anywhere = spread(videos.shape[1], options.frames), options.extra_text == "free"
        scores = []
        for video, prompt in zip(videos, prompts, strict=True):
            wanted = plain(quoted_text(prompt), options.case_sensitive)
            each = [
                accuracy(plain(self.read(picture), options.case_sensitive), wanted, anywhere)
                for picture in as_bytes(video[chosen])
            ]
            scores.append(max(each) if options.reduce == "max" else sum(each) / len(each))
        return torch.tensor(scores, dtype=torch.float32)
