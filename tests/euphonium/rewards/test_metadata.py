"""What a prompt file says besides texts reaches the rewards that ask for it, and no others."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from euphonium.prompt_files import DescribedPrompt
from euphonium.rewards.base import OutcomeReward
from euphonium.rewards.shared import Batch

PROMPTS = [DescribedPrompt("a cat", {"count": 2}), "a dog"]
VIDEOS = torch.rand(2, 1, 3, 4, 4)


class Counted:
    """Reads a number off the metadata, and spoils them for whoever comes next."""

    def score(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        assert [type(prompt) for prompt in prompts] == [str, str]
        counts = torch.tensor([float(entries.get("count", 0)) for entries in metadata])
        cast("dict[str, int]", metadata[0])["count"] = 9
        return counts


class Plain:
    """Knows nothing of metadata."""

    def score(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        assert [type(prompt) for prompt in prompts] == [str, str]
        return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_a_reward_that_asks_gets_the_metadata() -> None:
    batch = Batch(VIDEOS, PROMPTS)
    asking = cast("OutcomeReward", Counted())
    assert batch.score(asking).tolist() == batch.score(asking).tolist() == [2.0, 0.0]


def test_one_that_does_not_gets_texts_alone() -> None:
    assert Batch(VIDEOS, PROMPTS).score(Plain()).tolist() == [5.0, 5.0]
