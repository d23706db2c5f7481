"""Smoothness of motion, from dense optical flow between consecutive frames (OpenCV)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from euphonium.config import Node
from euphonium.rewards.frames import as_bytes, check_videos
from euphonium.rewards.pretrained import library


@dataclass(frozen=True)
class Motion:
    """Motion of one clip, as shares of the frame's shorter side.

    Attributes:
        speed: mean length of the flow, a frame.
        acceleration: mean length of the flow's change along the path of the moving point, a frame squared.
    """

    speed: float
    acceleration: float


class OpticalFlowReward:
    """1 for motion whose flow does not change from frame to frame, towards 0 for jitter, flicker and cuts.

    ``exp(-acceleration / tolerance)``, times ``min(1, speed / least_speed)`` where a least speed is asked for.
    Acceleration is the change of flow that a point sees while it travels: the flow from frame k + 1 is read where
    the flow from frame k has carried the point, so that a thing that moves steadily over a background that stands
    still is smooth. A still clip is smooth; ``least_speed`` keeps it from being rewarded.
    """

    class Options(Node):
        """How motion is measured, and how much of it is wanted."""

        method: Literal["dis", "farneback"] = "dis"
        """Dense inverse search, or Farneback's polynomial expansion (two to three times slower)."""
        side: Annotated[int, Field(ge=32)] = 128
        """Frames are scaled so that their shorter side has this many pixels."""
        tolerance: PositiveFloat = 0.01
        """Acceleration at which the reward is 1/e, as a share of the shorter side."""
        least_speed: Annotated[float, Field(ge=0)] = 0.0
        """Mean speed below which the reward falls off, as a share of the shorter side a frame; 0 asks for no motion."""
        threads: PositiveInt = 1
        """CPU threads of OpenCV, for the whole process."""

    def __init__(self, options: Options) -> None:
        """Prepares the flow algorithm.

        Raises:
            ConfigError: OpenCV is not installed.
        """
        self._cv2 = library("cv2", "optical_flow")
        self._cv2.setNumThreads(options.threads)
        self._dis = None
        if options.method == "dis":
            self._dis = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self.side = options.side
        self.tolerance = options.tolerance
        self.least_speed = options.least_speed

    def _flow(self, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Displacement (x, y) in pixels of every pixel of ``before``: float32 ``[height, width, 2]``."""
        flow: NDArray[np.float32]
        if self._dis is not None:
            flow = self._dis.calc(before, after, None)
        else:
            flow = self._cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 5, 21, 3, 7, 1.5, 0)
        return flow

    def _grey(self, video: Tensor) -> list[NDArray[np.uint8]]:
        """Frames as 8-bit grey pictures of the working size."""
        cv2 = self._cv2
        height, width = video.shape[-2:]
        scale = self.side / min(height, width)
        size = (round(width * scale), round(height * scale))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        frames = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in as_bytes(video))
        return [frame if scale == 1 else cv2.resize(frame, size, interpolation=how) for frame in frames]

    def measure(self, video: Tensor) -> Motion:
        """Speed and acceleration of one clip ``[frames, 3, height, width]`` in [0, 1] of at least three frames."""
        cv2 = self._cv2
        frames = self._grey(video)
        flows = [self._flow(before, after) for before, after in itertools.pairwise(frames)]
        rows, columns = torch.meshgrid(
            torch.arange(frames[0].shape[0]), torch.arange(frames[0].shape[1]), indexing="ij"
        )
        grid = torch.stack([columns, rows], dim=2).float().numpy()
        changes = []
        for now, later in itertools.pairwise(flows):
            there = grid + now
            carried = cv2.remap(later, there, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            inside = torch.from_numpy(
                (there[..., 0] >= 0)
                & (there[..., 0] <= grid[-1, -1, 0])
                & (there[..., 1] >= 0)
                & (there[..., 1] <= grid[-1, -1, 1])
            )
            change = torch.from_numpy(carried - now).square().sum(dim=2).sqrt()
            changes.append(float((change * inside).sum() / inside.sum().clamp(min=1)))
        speed = torch.stack([torch.from_numpy(flow).square().sum(dim=2).sqrt().mean() for flow in flows]).mean()
        return Motion(float(speed) / self.side, sum(changes) / len(changes) / self.side)

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos, float32 ``[batch]`` in [0, 1]; ignores the prompts.

        Raises:
            ValueError: clips of fewer than three frames.
        """
        check_videos(videos, prompts, least_frames=3)
        scores = []
        for video in videos:
            motion = self.measure(video)
            moved = min(1.0, motion.speed / self.least_speed) if self.least_speed else 1.0
            scores.append(moved * math.exp(-motion.acceleration / self.tolerance))
        return torch.tensor(scores, dtype=torch.float32)
