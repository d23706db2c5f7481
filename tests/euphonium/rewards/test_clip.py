"""CLIP rewards: networks of transformers' own classes with random weights, saved and loaded through the real path."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.base import OutcomeReward
from euphonium.rewards.clip import FramePreparation, LetterboxPreparation, from_open_clip
from euphonium.rewards.registry import build_reward

WIDTH, HEADS, LAYERS, IMAGE, PATCH, JOINT = 32, 2, 2, 28, 7, 16
PROMPTS = ["a red car", "two blue fish in a bowl"]


def clip_tokenizer() -> object:
    """Byte-level CLIP tokenizer with two merges."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")])


def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 28 pixels with weights large enough to tell inputs apart."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    target = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    tower = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": JOINT,
    }  # fmt: skip
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "pad_token_id": 0},
        vision_config={**tower, "image_size": IMAGE, "patch_size": PATCH},
        projection_dim=JOINT,
    )
    torch.manual_seed(0)
    network = CLIPModel(config)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)
    size = {"height": IMAGE, "width": IMAGE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=size).save_pretrained(target)
    return target


folder = pytest.fixture(scope="module", name="folder")(make_clip)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Aesthetic heads in the published layouts: one linear layer, and a chain numbered with gaps for dropout."""
    target = tmp_path_factory.mktemp("heads")
    generator = torch.Generator().manual_seed(3)
    chain = {}
    for number, (inner, outer) in zip((0, 2, 4, 6, 7), ((JOINT, 64), (64, 32), (32, 16), (16, 8), (8, 1)), strict=True):
        chain[f"layers.{number}.weight"] = torch.randn(outer, inner, generator=generator) * inner**-0.5
        chain[f"layers.{number}.bias"] = torch.randn(outer, generator=generator)
    linear = {"weight": torch.randn(1, JOINT, generator=generator), "bias": torch.randn(1, generator=generator)}
    paths = {"chain": target / "chain.pth", "linear": target / "linear.safetensors"}
    torch.save(chain, paths["chain"])
    save_file(linear, paths["linear"])
    return paths


def build(kind: str, **options: object) -> OutcomeReward:
    return build_reward(OutcomeRewardConfig(name="tested", type=kind, options={"device": "cpu", **options}))


def videos(frames: int = 3, height: int = 40, width: int = 52) -> Tensor:
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def by_the_library(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, float]:
    """Image and text embeddings and scale from transformers' own forward pass and processors."""
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    network = CLIPModel.from_pretrained(folder).eval()
    pictures = [Image.fromarray(np.asarray(i.permute(1, 2, 0).mul(255).round().to(torch.uint8))) for i in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = network(**tokens, pixel_values=pixels["pixel_values"])
    return found.image_embeds, found.text_embeds, float(network.logit_scale.detach().exp())


@pytest.mark.parametrize("size", [(40, 52), (52, 40), (28, 28), (21, 33), (62, 31)])
def test_preparation_is_the_library_processors(folder: Path, size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(2))
    pictures = [Image.fromarray(np.asarray(i.permute(1, 2, 0).mul(255).round().to(torch.uint8))) for i in images]
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    ours = FramePreparation(processor)(images)
    # One of 255 levels, in units of the smallest standard deviation; on average far less.
    assert float((ours - theirs).abs().max()) <= 1.01 / 255 / min(processor.image_std)
    assert float((ours - theirs).abs().mean()) < 0.1 / 255 / min(processor.image_std)


def test_letterbox_keeps_the_whole_picture_between_black_bars(folder: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = LetterboxPreparation(processor)(torch.ones(1, 3, 28, 56))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    levels = pixels[0] * std + mean
    torch.testing.assert_close(levels[:, 7:21], torch.ones(3, 14, IMAGE), atol=1e-5, rtol=0)
    torch.testing.assert_close(levels[:, :7], torch.zeros(3, 7, IMAGE), atol=1e-5, rtol=0)
    torch.testing.assert_close(levels[:, 21:], torch.zeros(3, 7, IMAGE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip_score", "pickscore"])
def test_scores_are_the_librarys_similarities_averaged_over_frames(folder: Path, kind: str) -> None:
    batch = videos(frames=3)
    scores = build(kind, weights=str(folder), batch=4).score(batch, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.shape == (2,)
    images, texts, scale = by_the_library(folder, batch.flatten(0, 1), PROMPTS)
    expected = torch.einsum("bfw,bw->bf", images.view(2, 3, -1), texts).mean(dim=1)
    expected = expected * scale if kind == "pickscore" else expected
    torch.testing.assert_close(scores, expected, atol=2e-3 * (scale if kind == "pickscore" else 1), rtol=0)
    assert float((scores[0] - scores[1]).abs()) > 5e-3 * (scale if kind == "pickscore" else 1)


def test_few_frames_of_a_long_video_are_scored(folder: Path) -> None:
    batch = videos(frames=9)
    few = build("clip_score", weights=str(folder), frames=3).score(batch, PROMPTS)
    same = build("clip_score", weights=str(folder), frames=9).score(batch[:, [0, 4, 8]], PROMPTS)
    torch.testing.assert_close(few, same)


@pytest.mark.parametrize("kind", ["clip_score", "pickscore", "hps_v21", "aesthetic"])
def test_scores_are_deterministic_independent_of_the_batch_and_bounded(
    folder: Path, heads: dict[str, Path], kind: str
) -> None:
    extra = {"head": str(heads["chain"])} if kind == "aesthetic" else {}
    reward = build(kind, weights=str(folder), **extra)
    batch = videos()
    first = reward.score(batch, PROMPTS)
    assert torch.equal(first, reward.score(batch.clone(), PROMPTS))
    torch.testing.assert_close(first[1:], reward.score(batch[1:], PROMPTS[1:]), atol=1e-4, rtol=1e-4)
    if kind in ("clip_score", "hps_v21"):
        assert float(first.abs().max()) <= 1


def test_long_prompts_are_cut(folder: Path) -> None:
    scores = build("clip_score", weights=str(folder)).score(videos(), ["red " * 500, PROMPTS[1]])
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("layout", ["chain", "linear"])
def test_the_aesthetic_head_is_applied_to_unit_features(folder: Path, heads: dict[str, Path], layout: str) -> None:
    batch = videos(frames=2)
    scores = build("aesthetic", weights=str(folder), head=str(heads[layout])).score(batch, PROMPTS)
    features, _, _ = by_the_library(folder, batch.flatten(0, 1), PROMPTS)
    if layout == "chain":
        state = torch.load(heads[layout], weights_only=True)
        shapes = [state[f"layers.{n}.weight"].shape[::-1] for n in (0, 2, 4, 6, 7)]
        # Dropout between the layers, as in the published predictor, gives the numbers their gaps.
        modules: list[nn.Module] = []
        for position, shape in enumerate(shapes):
            modules.append(nn.Linear(*shape))
            if position < 3:
                modules.append(nn.Dropout(0.5))
        head = nn.Sequential(*modules).eval()
        head.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
        expected = head(features)
    else:
        from safetensors.torch import load_file

        expected = functional.linear(features, *(load_file(heads[layout])[k] for k in ("weight", "bias")))
    torch.testing.assert_close(scores, expected.view(2, 2).mean(dim=1).detach(), atol=5e-3, rtol=0)


class Block(nn.Module):
    """A transformer block under OpenCLIP's names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 2 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2 + 1, WIDTH) * 0.3)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Stack()
        self.proj = nn.Parameter(torch.randn(WIDTH, JOINT) * 0.2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as OpenCLIP lays it out: fused attention inputs, transposed projections, the highest id ends the text."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(77, WIDTH) * 0.3)
        self.transformer = Stack()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, JOINT) * 0.2)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("attn_mask", torch.full((77, 77), float("-inf")).triu(1))

    def text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, self.attn_mask[:length, :length]))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection


def test_an_open_clip_checkpoint_scores_as_in_its_own_layout(folder: Path, tmp_path: Path) -> None:
    """HPS v2.1 is published so; the reference network is written here from torch's own attention."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = clip_tokenizer()
    torch.manual_seed(5)
    reference = OpenClip(len(tokenizer)).eval()
    for block in reference.modules():
        if isinstance(block, nn.MultiheadAttention):
            nn.init.normal_(block.in_proj_bias, std=0.2)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": reference.state_dict()}, file)
    batch = videos(frames=2)
    scores = build("hps_v21", weights=str(folder), checkpoint=str(file)).score(batch, PROMPTS)

    with torch.no_grad():
        pixels = LetterboxPreparation(CLIPImageProcessorPil.from_pretrained(folder))(batch.flatten(0, 1))
        images = functional.normalize(reference.visual(pixels), dim=1).view(2, 2, -1)
        texts = functional.normalize(reference.text(tokenizer(PROMPTS, padding=True, return_tensors="pt")["input_ids"]))
    expected = torch.einsum("bfw,bw->bf", images, texts).mean(dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert float((scores[0] - scores[1]).abs()) > 1e-3


def test_unknown_names_of_a_checkpoint_are_kept_and_refused(folder: Path, tmp_path: Path) -> None:
    assert set(from_open_clip({"score_head.weight": torch.zeros(1)})) == {"score_head.weight"}
    file = tmp_path / "other.pt"
    torch.save({"state_dict": {"score_head.weight": torch.zeros(1)}}, file)
    with pytest.raises(ConfigError, match=r"option checkpoint: .*surplus \['score_head.weight'\]"):
        build("hps_v21", weights=str(folder), checkpoint=str(file))


def test_a_pickle_with_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    import pickle

    marker, file = tmp_path / "ran", tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(marker),)  # type: ignore[return-value]

    file.write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(ConfigError, match=r"option head: cannot load"):
        build("aesthetic", weights=str(folder), head=str(file))
    torch.save({"weight": Evil()}, file)
    with pytest.raises(ConfigError, match=r"option head: cannot load"):
        build("aesthetic", weights=str(folder), head=str(file))
    assert not marker.exists()


def test_a_head_for_other_features_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"option head: .*takes 768 features.*gives 16"):
        build("aesthetic", weights=str(folder), head=str(file))
    save_file({"weight": torch.zeros(3, JOINT), "bias": torch.zeros(3)}, file)
    with pytest.raises(ConfigError, match=r"do not follow on each other to one output"):
        build("aesthetic", weights=str(folder), head=str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "/no/such/folder"}, "option weights: no folder '/no/such/folder'"),
        ({"weights": "openai/clip-vit-large-patch14"}, "option revision: .*must be pinned to a commit"),
        ({"weights": "openai/clip-vit-large-patch14", "revision": "main"}, "got 'main'"),
        ({"weights": "openai/clip-vit-large-patch14", "revision": "a" * 40}, "option weights: cannot load"),
        ({"dtype": "int8"}, "dtype: input should be .*got 'int8'"),
        ({"frames": 0}, "frames: input should be greater than 0, got 0"),
        ({"checkpoint": "nothing.pt"}, "option checkpoint: no file 'nothing.pt'"),
        ({"checkpoint": "xswu/HPSv2:HPS_v2.1_compressed.pt"}, r"option checkpoint_revision: 'xswu/HPSv2' is a hub id"),
    ],
)
def test_weights_that_cannot_be_had_are_named(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("hps_v21", **{"weights": str(folder), **options})


def test_code_in_a_folder_runs_only_when_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    """A CLIP whose configuration names a Python file of its own folder."""
    import shutil

    target, marker = tmp_path / "remote", tmp_path / "ran"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "own_clip", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (target / "config.json").write_text(json.dumps(config))
    (target / "own.py").write_text(
        "import pathlib\n"
        "from transformers import CLIPConfig, CLIPModel\n"
        f"pathlib.Path({str(marker)!r}).touch()\n"
        "class OwnConfig(CLIPConfig):\n    model_type = 'own_clip'\n"
        "class OwnModel(CLIPModel):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ConfigError, match="trust_remote_code"):
        build("clip_score", weights=str(target))
    assert not marker.exists()
    trusted = build("clip_score", weights=str(target), trust_remote_code=True).score(videos(), PROMPTS)
    assert marker.exists()
    torch.testing.assert_close(trusted, build("clip_score", weights=str(folder)).score(videos(), PROMPTS))


def test_damaged_weights_are_refused_and_missing_ones_not_made_up(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    with pytest.raises(ConfigError, match=r"option weights: cannot load .*model\.safetensors is missing, cut"):
        build("clip_score", weights=str(copy), dtype="float32")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["visual_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack visual_projection\.weight.*download or copy it again"):
        build("clip_score", weights=str(copy), dtype="float32")
