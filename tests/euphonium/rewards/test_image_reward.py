"""ImageReward: a small file of the published names, against the networks written out in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.image_reward import MEAN, STD, TOKENS, ImageReward
from euphonium.rewards.registry import build_reward

WIDTH, TEXT, SIDE, PATCH, WORDS = 128, 64, 32, 8, 40
PROMPTS = ["a red car", "two blue fish in a bowl"]
State = dict[str, Tensor]


def published_state() -> State:
    """Random weights under the names of the published file, of one large and one small head width."""
    drawn = torch.Generator().manual_seed(0)

    def linear(name: str, inner: int, outer: int) -> State:
        scale = 1.5 * inner**-0.5
        return {
            f"{name}.weight": torch.randn(outer, inner, generator=drawn) * scale,
            f"{name}.bias": torch.randn(outer, generator=drawn) * 0.1,
        }

    def norm(name: str, width: int) -> State:
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(width, generator=drawn),
            f"{name}.bias": 0.1 * torch.randn(width, generator=drawn),
        }

    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    state: State = {
        f"{seen}cls_token": torch.randn(1, 1, WIDTH, generator=drawn),
        f"{seen}pos_embed": torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH, generator=drawn),
        f"{seen}patch_embed.proj.weight": 0.2 * torch.randn(WIDTH, 3, PATCH, PATCH, generator=drawn),
        f"{seen}patch_embed.proj.bias": torch.randn(WIDTH, generator=drawn),
        f"{read}embeddings.word_embeddings.weight": torch.randn(WORDS, TEXT, generator=drawn),
        f"{read}embeddings.position_embeddings.weight": torch.randn(64, TEXT, generator=drawn),
        # What is in the file besides, and scores do not need.
        f"{read}embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.weight": torch.zeros(4, WIDTH),
    }
    state |= norm(f"{seen}norm", WIDTH) | norm(f"{read}embeddings.LayerNorm", TEXT)
    for i in range(2):
        block = f"{seen}blocks.{i}."
        state |= norm(f"{block}norm1", WIDTH) | norm(f"{block}norm2", WIDTH)
        state |= linear(f"{block}attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{block}attn.proj", WIDTH, WIDTH)
        state |= linear(f"{block}mlp.fc1", WIDTH, 2 * WIDTH) | linear(f"{block}mlp.fc2", 2 * WIDTH, WIDTH)
        layer = f"{read}encoder.layer.{i}."
        for part, width in (("attention", TEXT), ("crossattention", WIDTH)):
            state |= linear(f"{layer}{part}.self.query", TEXT, TEXT)
            state |= linear(f"{layer}{part}.self.key", width, TEXT) | linear(f"{layer}{part}.self.value", width, TEXT)
            state |= linear(f"{layer}{part}.output.dense", TEXT, TEXT) | norm(f"{layer}{part}.output.LayerNorm", TEXT)
        state |= linear(f"{layer}intermediate.dense", TEXT, 96) | linear(f"{layer}output.dense", 96, TEXT)
        state |= norm(f"{layer}output.LayerNorm", TEXT)
    for number, (inner, outer) in zip((0, 2, 4, 6, 7), ((TEXT, 48), (48, 32), (32, 16), (16, 8), (8, 1)), strict=True):
        state |= linear(f"mlp.layers.{number}", inner, outer)
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The weights, and a tokenizer of BERT's kind."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(published_state(), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "car", "two", "blue", "fish", "in", "bowl"]
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(folder / "tokenizer")
    return folder / "ImageReward.pt", folder / "tokenizer"


def made(files: tuple[Path, Path], **options: object) -> ImageReward:
    given = {"weights": str(files[0]), "tokenizer": str(files[1]), "device": "cpu", **options}
    reward = build_reward(OutcomeRewardConfig(name="image_reward", type="image_reward", options=given))
    assert isinstance(reward, ImageReward)
    return reward


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of heads of 64, over ``[batch, tokens, width]``."""
    q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (query, key, value))
    weights = q @ k.transpose(-1, -2) / 8
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None].bool(), -torch.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def written_out(state: State, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """BLIP as its authors have it, the head, and the centring, in functions alone."""

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    patches = functional.conv2d(
        pixels, state[f"{seen}patch_embed.proj.weight"], state[f"{seen}patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([state[f"{seen}cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + state[f"{seen}pos_embed"]
    for i in range(2):
        block = f"{seen}blocks.{i}."
        q, k, v = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(f"{block}attn.proj", attend(q, k, v))
        inner = functional.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6)))
        x = x + linear(f"{block}mlp.fc2", inner)
    x = norm(f"{seen}norm", x, 1e-6)
    y = state[f"{read}embeddings.word_embeddings.weight"][words]
    y = y + state[f"{read}embeddings.position_embeddings.weight"][: words.shape[1]]
    y = norm(f"{read}embeddings.LayerNorm", y, 1e-12)
    for i in range(2):
        layer = f"{read}encoder.layer.{i}."
        for part, source, hidden in (("attention", None, mask), ("crossattention", x, None)):
            at = f"{layer}{part}."
            told = y if source is None else source
            found = attend(
                linear(f"{at}self.query", y), linear(f"{at}self.key", told), linear(f"{at}self.value", told), hidden
            )
            y = norm(f"{at}output.LayerNorm", linear(f"{at}output.dense", found) + y, 1e-12)
        inner = functional.gelu(linear(f"{layer}intermediate.dense", y))
        y = norm(f"{layer}output.LayerNorm", linear(f"{layer}output.dense", inner) + y, 1e-12)
    score = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{number}", score)
    return (score[:, 0] - MEAN) / STD


def test_scores_are_those_of_the_published_network(files: tuple[Path, Path]) -> None:
    from transformers import BertTokenizer

    # Of the network's own size nothing is resized.
    videos = torch.rand(2, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    videos = (videos * 255).round() / 255
    scores = made(files, frames=3, batch=4).score(videos, PROMPTS)
    mean, std = ((torch.tensor(v)[:, None, None]) for v in ((0.48145466, 0.4578275, 0.40821073),
                                                           (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    tokens = BertTokenizer.from_pretrained(files[1])(
        PROMPTS, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    wanted = torch.stack(
        [
            written_out(published_state(), (videos[:, f] - mean) / std, tokens["input_ids"], tokens["attention_mask"])
            for f in range(3)
        ]
    ).mean(dim=0)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
    assert abs(float(scores[0] - scores[1])) > 0.01
    other = made(files, frames=3).score(videos, PROMPTS[::-1])
    assert not torch.allclose(other, scores, atol=1e-3), "the prompt matters"


def test_other_sizes_are_cut_to_the_centre(files: tuple[Path, Path]) -> None:
    videos = torch.rand(1, 1, 3, SIDE, 3 * SIDE, generator=torch.Generator().manual_seed(2))
    middle = videos[..., SIDE : 2 * SIDE].contiguous()
    reward = made(files)
    torch.testing.assert_close(reward.score(videos, PROMPTS[:1]), reward.score(middle, PROMPTS[:1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if "patch_embed" not in n}, "cannot load .*patch_embedding"),
        (lambda s: {n: t for n, t in s.items() if "blocks.1.norm1" not in n}, "missing"),
        (lambda s: {n: t for n, t in s.items() if n.startswith("mlp")}, "cannot load"),
    ],
)
def test_a_file_of_another_network_is_refused(
    damage: Callable[[State], State], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.save(damage(published_state()), tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=f"option weights: .*{message}"):
        made((tmp_path / "other.pt", files[1]))
