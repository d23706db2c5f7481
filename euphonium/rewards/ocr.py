"""Accuracy of text that a prompt asks for, read off the pixels by RapidOCR (PP-OCR networks on onnxruntime)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

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

    def __init__(
        self,
        frames: int = 4,
        reduce: Literal["mean", "max"] = "mean",
        extra_text: Literal["counted", "free"] = "counted",
        case_sensitive: bool = False,
        min_confidence: float = 0.5,
        side: int = 736,
        threads: int = 1,
    ) -> None:
        """Loads the two networks that the package brings along.

        Args:
            frames: frames of a video that are read, evenly spread.
            reduce: mean over those frames, or the best of them.
            extra_text: whether other text in the picture counts as errors, or is free.
            case_sensitive: tell capital and small letters apart.
            min_confidence: lines that the network is less sure of are not read.
            side: larger pictures are scaled down to this longer side before text is searched; smaller ones are
                searched as they are.
            threads: CPU threads.

        Raises:
            ConfigError: RapidOCR or onnxruntime is not installed.
            ValueError: an option out of range.
        """
        if reduce not in ("mean", "max") or extra_text not in ("counted", "free"):
            raise ValueError("reduce must be mean or max, and extra_text counted or free")
        if frames < 1 or side < 32 or not 0 <= min_confidence <= 1:
            raise ValueError("frames must be at least 1, side at least 32, and min_confidence in [0, 1]")
        library("onnxruntime", "ocr")
        self._engine = library("rapidocr", "ocr").RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.log_level": "error",
                "Global.text_score": min_confidence,
                "Det.limit_type": "max",
                "Det.limit_side_len": side,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        self.frames = frames
        self.reduce = reduce
        self.anywhere = extra_text == "free"
        self.case_sensitive = case_sensitive

    def read(self, picture: Any) -> str:
        """Text of an RGB picture, uint8 ``[height, width, 3]``, line by line."""
        found = self._engine(picture[..., ::-1].copy())
        return " ".join(found.txts or ())

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """See :class:`euphonium.rewards.base.OutcomeReward`; in [0, 1], 1 where every letter is right.

        Raises:
            ValueError: a prompt without quoted text.
        """
        check_videos(videos, prompts)
        chosen = spread(videos.shape[1], self.frames)
        scores = []
        for video, prompt in zip(videos, prompts, strict=True):
            wanted = plain(quoted_text(prompt), self.case_sensitive)
            each = [
                accuracy(plain(self.read(picture), self.case_sensitive), wanted, self.anywhere)
                for picture in as_bytes(video[chosen])
            ]
            scores.append(max(each) if self.reduce == "max" else sum(each) / len(each))
        return torch.tensor(scores, dtype=torch.float32)
