"""SoliReward: transformers' InternVL with weights in the published layout, against the authors' own network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.pretrained import fill
from euphonium.rewards.registry import build_reward
from euphonium.rewards.solireward import (
    IMAGE_MEAN,
    IMAGE_STD,
    RewardHead,
    SoliReward,
    from_internvl_chat,
    segment_middles,
    tile_grid,
    tiles_of,
    transformers_config,
)

REFERENCE = Path(__file__).parents[2] / "data" / "solireward_reference.safetensors"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM, USER = "Say good or bad.", "Made from: {prompt}. The video:"
TILE = 28


def read_reference() -> dict[str, Any]:
    """Weights, inputs and scores of the authors' classes with random weights (its metadata says which)."""
    with safe_open(REFERENCE, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = file.metadata()
    state = {name.removeprefix("state."): part for name, part in held.items() if name.startswith("state.")}
    texts = {name: json.loads(notes[name]) for name in ("config", "head", "image_token")}
    return {**held, **texts, "state": state}


reference = pytest.fixture(scope="module", name="reference")(read_reference)


def networks(reference: dict[str, Any], image_token: int) -> tuple[Any, RewardHead]:
    from transformers import InternVLModel

    config = transformers_config(reference["config"], image_token)
    config._attn_implementation = "sdpa"
    backbone = InternVLModel(config)
    head = RewardHead(16, reference["head"]["reduce_sequence"], reference["head"]["hierarchical_query_attn_layers"])
    ours = {n: p for n, p in reference["state"].items() if n.startswith(("reward_head.", "attention_query"))}
    rest = {n: p for n, p in reference["state"].items() if n not in ours}
    fill(head, ours, "weights", "reference")
    fill(backbone, from_internvl_chat(rest), "weights", "reference")
    return backbone.eval(), head.eval()


def test_scores_are_those_of_the_authors_network(reference: dict[str, Any]) -> None:
    """Vision tower, projector, language model and head, with padding in the second row."""
    backbone, head = networks(reference, reference["image_token"])
    with torch.no_grad():
        found = backbone(
            input_ids=reference["tokens"],
            attention_mask=reference["mask"],
            pixel_values=reference["pixels"].float(),
            output_hidden_states=True,
            use_cache=False,
        )
        scores = head(found.hidden_states, reference["mask"].bool())
    torch.testing.assert_close(scores, reference["scores"], atol=1e-5, rtol=1e-5)
    assert float((scores[0] - scores[1]).abs()) > 1e-3


def make_checkpoint(reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's weights on disk as the authors publish theirs."""
    from transformers import Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("solireward") / "pixel_orm" / "physics"
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokenizer = Qwen2Tokenizer(
        vocab={letter: number for number, letter in enumerate(letters)},
        merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"],
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(reference["config"]))
    settings = {
        "model_args": {"model_type": "InternVL3", **reference["head"]},
        "internvl_args": {"input_size": TILE, "max_num": 4, "num_segments": 3, "center_crop_video": False},
    }
    (folder / "training_config.json").write_text(json.dumps(settings))
    # In two files, as large checkpoints are.
    names = sorted(reference["state"])
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({n: reference["state"][n].clone() for n in part}, folder / f"model-0000{number}-of-00002.safetensors")
    return folder


checkpoint = pytest.fixture(scope="module", name="checkpoint")(make_checkpoint)


def build(checkpoint: Path, **options: Any) -> SoliReward:
    given = {
        "weights": str(checkpoint), "system_prompt": SYSTEM, "user_prompt": USER, "dtype": "float32", "device": "cpu",
        **options,
    }  # fmt: skip
    made = build_reward(OutcomeRewardConfig(name="tested", type="solireward", options=given))
    assert isinstance(made, SoliReward)
    return made


def videos(frames: int = 7, height: int = 40, width: int = 78) -> Tensor:
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def library_tiles(frames: Tensor, most: int) -> tuple[Tensor, list[int]]:
    """Normalised tiles by transformers' image processor of InternVL."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=most, min_patches=1,
        image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD),
    )  # fmt: skip
    pictures = [Image.fromarray(np.asarray(f.permute(1, 2, 0).to(torch.uint8))) for f in frames]
    found = processor(pictures, return_tensors="pt")
    return found["pixel_values"], found["num_patches"].tolist()


@pytest.mark.parametrize("size", [(40, 78), (78, 40), (30, 30), (28, 84), (56, 56)])
def test_tiles_are_the_library_processors(size: tuple[int, int]) -> None:
    noise = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    frames = functional.interpolate(noise, size, mode="bicubic").clamp(0, 1).mul(255).round()
    theirs, counts = library_tiles(frames, most=4)
    ours = tiles_of(frames, TILE, 4)
    assert counts == [ours.shape[1]] * 2
    levels = theirs * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    # Two roundings; Pillow takes the columns of some tall pictures before their rows.
    assert float((ours.flatten(0, 1) - levels * 255).abs().max()) < 2.01
    assert float((ours.flatten(0, 1) - levels * 255).abs().mean()) < 0.1


@pytest.mark.parametrize("most", [1, 6, 12])
def test_tile_grids_are_the_librarys(most: int) -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    sizes = [(480, 832), (832, 480), (720, 1280), (448, 448), (900, 900), (200, 200), (300, 1000), (640, 480)]
    for height, width in sizes:
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
        assert tile_grid(height, width, 448, most) == (rows, columns)


def test_the_whole_path_is_tiles_text_backbone_and_head(reference: dict[str, Any], checkpoint: Path) -> None:
    reward, batch, prompts = build(checkpoint), videos(), ["a red car", "fish"]
    scores = reward.score(batch, prompts)
    assert scores.dtype == torch.float32
    assert scores.shape == (2,)

    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(checkpoint)
    backbone, head = networks(reference, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    for video, prompt, score in zip(batch, prompts, scores, strict=True):
        pixels, counts = library_tiles(video[[1, 3, 5]].mul(255).round(), most=4)
        # 40 x 78 is cut into 1 x 2 tiles and shown whole as well; 4 tokens a tile.
        assert counts == [3, 3, 3]
        picture = "<img>" + "<IMG_CONTEXT>" * 12 + "</img>"
        text = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nMade from: {prompt}. The video:"
            f"Frame1: {picture}\nFrame2: {picture}\nFrame3: {picture}\n<|im_end|>\n<|im_start|>assistant\n"
        )
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found = backbone(input_ids=tokens, pixel_values=pixels, output_hidden_states=True, use_cache=False)
            expected = head(found.hidden_states, torch.ones_like(tokens, dtype=torch.bool))
        torch.testing.assert_close(score[None], expected, atol=5e-3, rtol=5e-3)


def test_batches_are_padded_without_changing_scores(checkpoint: Path) -> None:
    prompts = ["a red car that drives along a winding road", "fish"]
    one = build(checkpoint).score(videos(), prompts)
    two = build(checkpoint, batch=2).score(videos(), prompts)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert torch.equal(one, build(checkpoint).score(videos(), prompts))
    assert float((one[0] - one[1]).abs()) > 1e-4


def test_frames_and_prompt_matter(checkpoint: Path) -> None:
    reward, batch = build(checkpoint), videos()
    first = reward.score(batch, ["a", "b"])
    assert float((reward.score(batch.flip(1), ["a", "b"]) - first).abs().max()) > 1e-4
    other = reward.score(batch, ["a", "another one"])
    assert abs(float(other[0] - first[0])) < 1e-5 < abs(float(other[1] - first[1]))


def test_a_single_image_is_shown_as_every_frame(checkpoint: Path) -> None:
    reward, image = build(checkpoint), videos(frames=1)
    torch.testing.assert_close(
        reward.score(image, ["a", "b"]), reward.score(image.expand(-1, 3, -1, -1, -1), ["a", "b"])
    )


@pytest.mark.parametrize(
    ("frames", "segments", "expected"),
    [(81, 8, [5, 15, 25, 35, 45, 55, 65, 75]), (9, 4, [1, 3, 5, 7]), (7, 3, [1, 3, 5]), (1, 3, [0, 0, 0])],
)
def test_frames_are_the_middles_of_equal_parts(frames: int, segments: int, expected: list[int]) -> None:
    assert segment_middles(frames, segments) == expected


@pytest.mark.parametrize("kind", RewardHead.KINDS)
def test_every_head_ignores_padding(kind: str) -> None:
    torch.manual_seed(0)
    head = RewardHead(16, kind, [1, 2]).eval()
    states = [torch.randn(2, 9, 16) for _ in range(4)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    with torch.no_grad():
        padded, cut = head(states, mask), head([s[:, :6] for s in states], mask[:, :6])
    torch.testing.assert_close(padded, cut, atol=1e-5, rtol=1e-5)


def test_a_centre_crop_is_made_when_the_checkpoint_says_so(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    target = tmp_path / "cropping"
    shutil.copytree(checkpoint, target)
    settings = json.loads((target / "training_config.json").read_text())
    settings["internvl_args"]["center_crop_video"] = True
    (target / "training_config.json").write_text(json.dumps(settings))
    batch = videos()
    whole = build(checkpoint).score(batch[..., 19:59], ["a", "b"])
    torch.testing.assert_close(build(target).score(batch, ["a", "b"]), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "/none"}, "option weights: no folder '/none'"),
        ({"weights": "Yukino271828/SoliReward"}, "option revision: .*must be pinned to a commit"),
        ({"subfolder": "deeper"}, "no config.json in .*see the option subfolder"),
        ({"batch": 0}, "batch: input should be greater than 0, got 0"),
        ({"dtype": "int4"}, "dtype: input should be .*got 'int4'"),
    ],
)
def test_what_is_missing_is_named(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(checkpoint, **options)


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("training_config.json", ("model_args", "reduce_sequence"), "good_token", "'good_token' is not supported"),
        ("config.json", ("llm_config", "architectures"), ["LlamaForCausalLM"], "only Qwen2ForCausalLM"),
        ("config.json", ("ps_version",), "v1", "only ps_version v2"),
        ("config.json", ("vision_config", "num_hidden_layers"), 3, "does not fit InternVLModel: missing"),
    ],
)
def test_other_kinds_of_internvl_are_refused(
    checkpoint: Path, tmp_path: Path, file: str, path: tuple[str, ...], value: object, message: str
) -> None:
    import shutil

    target = tmp_path / "other"
    shutil.copytree(checkpoint, target)
    held = json.loads((target / file).read_text())
    place = held
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (target / file).write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=message):
        build(target)


def test_picture_tokens_in_a_prompt_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="must not contain the reward model's own tokens"):
        build(checkpoint).score(videos()[:1], ["<IMG_CONTEXT>"])
