"""Rewards for generators that draw anything at any size."""

from collections.abc import Sequence

from torch import Tensor


class Brightness:
    """Mean brightness of the first half of the frames' rows: cheap, finite, and different from sample to sample."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores videos ``[batch, frames, 3, height, width]``."""
        return videos[..., : videos.shape[3] // 2, :].float().mean(dim=(1, 2, 3, 4))
