"""HPSv3: a tiny Qwen2-VL with its head, saved as the published file is, against its authors' forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.hpsv3 import HpsV3, read_instruction
from euphonium.rewards.registry import build_reward
from tests.euphonium.rewards.test_videoalign import byte_tokenizer

SIDE = 448  # of as many pixels as every picture is brought to
PROMPTS = ["a red car drives by", "two fish"]
INSTRUCTION = 'Rate "{text_prompt}".\n'
ASKED = " Give ratings: <|Reward|> END "
CHAT = (
    "<|im_start|>system\nYou help.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File ``weights``, folder ``base``, file ``template``, and the network that was saved."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    root = tmp_path_factory.mktemp("hpsv3")
    base = root / "Qwen2-VL"
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    number = tokenizer.convert_tokens_to_ids
    flat = {
        "model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 50,
        "max_position_embeddings": 4096, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"), "vision_end_token_id": number("<|vision_end|>"),
        "vision_config": {
            "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "model_type": "qwen2_vl",
        },
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(flat))
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280).save_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]}, replace_extra_special_tokens=False)
    torch.manual_seed(0)
    network = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(base))
    network.resize_token_embeddings(len(tokenizer))
    network.rm_head = nn.Sequential(
        nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    network.eval()
    # The names that the published file has: those of the authors' version of transformers.
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor.contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(old, root / "HPSv3.safetensors")
    (root / "data_collator_qwen.py").write_text(
        f"raise SystemExit('read, not run')\nINSTRUCTION = {INSTRUCTION!r}\nprompt_with_special_token = {ASKED!r}\n"
    )
    return {
        "weights": root / "HPSv3.safetensors", "base": base, "template": root / "data_collator_qwen.py",
        "network": network, "tokenizer": tokenizer,
    }  # fmt: skip


def build(published: dict[str, Any], **options: Any) -> HpsV3:
    given = {name: str(published[name]) for name in ("weights", "base", "template")}
    given |= {"dtype": "float32", "device": "cpu", **options}
    made = build_reward(OutcomeRewardConfig(name="hps", type="hpsv3", options=given))
    assert isinstance(made, HpsV3)
    return made


def pictures(count: int = 2, frames: int = 1, side: int = SIDE) -> Tensor:
    drawn = torch.rand(count, frames, 3, side, side, generator=torch.Generator().manual_seed(4))
    return drawn.mul(255).round().div(255)


def as_its_authors(published: dict[str, Any], picture: Tensor, prompt: str) -> Tensor:
    """Both outputs for one picture: embeddings put together by hand, no ids and no positions given to the network."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(published["base"])
    tokenizer, network = published["tokenizer"], published["network"]
    pixels = picture.permute(1, 2, 0).mul(255).round().to(torch.uint8)
    found = processor([Image.fromarray(np.asarray(pixels))], return_tensors="pt")
    merged = int(found["image_grid_thw"][0].prod()) // 4
    text = (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * merged
        + f"<|vision_end|>{INSTRUCTION.format(text_prompt=prompt)}{ASKED}<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        embedded = network.model.language_model.embed_tokens(tokens)
        seen = network.model.visual(found["pixel_values"], grid_thw=found["image_grid_thw"])
        seen = getattr(seen, "pooler_output", seen)
        place = (tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>"))[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(place, seen)
        hidden = network.model.language_model(inputs_embeds=embedded).last_hidden_state[0]
        at = tokens[0].tolist().index(tokenizer.convert_tokens_to_ids("<|Reward|>"))
        output: Tensor = network.rm_head(hidden[at])
    return output


def test_scores_are_the_means_of_the_authors_network(published: dict[str, Any]) -> None:
    videos = pictures()
    wanted = torch.stack([as_its_authors(published, v[0], p)[0] for v, p in zip(videos, PROMPTS, strict=True)])
    scores = build(published).score(videos, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, atol=2e-4, rtol=1e-4)
    assert float((scores[0] - scores[1]).abs()) > 1e-3


def test_frames_are_averaged_in_batches_that_change_nothing(published: dict[str, Any]) -> None:
    videos = pictures(frames=3)
    wanted = torch.stack([build(published).score(videos[:, f : f + 1], PROMPTS) for f in range(3)]).mean(dim=0)
    for batch in (1, 4):
        found = build(published, frames=3, batch=batch).score(videos, PROMPTS)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_other_sizes_are_brought_to_as_many_pixels(published: dict[str, Any]) -> None:
    small = torch.nn.functional.interpolate(pictures(1)[0], (64, 96), mode="area")[None]
    assert torch.isfinite(build(published).score(small, PROMPTS[:1])).all()


def test_a_prompt_may_not_hold_the_network_s_tokens(published: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must not contain the reward model's own tokens"):
        build(published).score(pictures(1), ["a <|Reward|>"])


def test_instructions_are_read_and_not_run(published: dict[str, Any], tmp_path: Path) -> None:
    assert read_instruction(published["template"]) == INSTRUCTION + ASKED
    (tmp_path / "own.txt").write_text("Rate {text_prompt}: <|Reward|>")
    assert read_instruction(tmp_path / "own.txt") == "Rate {text_prompt}: <|Reward|>"
    for name, text, message in (
        ("a.txt", "Rate {text_prompt}", r"must hold each of <\|Reward\|> exactly once"),
        ("a.py", "x = (", "no readable Python"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_instruction(tmp_path / name)
    with pytest.raises(ConfigError, match="option template: no file"):
        read_instruction(tmp_path / "none.py")


def test_a_file_of_another_network_is_refused(published: dict[str, Any], tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="is no HPSv3"):
        build(published, weights=str(tmp_path / "other.safetensors"))
