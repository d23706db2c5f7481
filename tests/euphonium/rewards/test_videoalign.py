"""VideoAlign's reward: a tiny Qwen2-VL with real PEFT adapters, saved in the layout of the published checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.registry import build_reward, build_rewards
from euphonium.rewards.shared import Batch
from euphonium.rewards.videoalign import VideoAlignReward, frame_size, patches, read_template, sampled_frames
from euphonium.rewards.videoalign_checkpoint import VideoRewardNetwork

HEIGHT, WIDTH = 308, 336  # a size that the reward leaves as it is
NORM = {"VQ": (3.0, 2.0), "MQ": (1.0, 0.5), "TA": (2.5, 4.0)}
RUBRIC = 'Rate "{text_prompt}".\nClear: <|VQ_reward|> END\nMoves: <|MQ_reward|> END\nFits: <|TA_reward|> END'
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["a red car drives by", "two fish"]


def byte_tokenizer(specials: list[str]) -> Any:
    from transformers import Qwen2Tokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=specials)


def make_published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders ``weights`` and ``base``, file ``template``, and the network that was saved."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    root = tmp_path_factory.mktemp("videoalign")
    weights, base = root / "VideoReward", root / "Qwen2-VL"
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
         "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(weights / "checkpoint-7" / "tokenizer")
    number = tokenizer.convert_tokens_to_ids
    # Flat, as the hub has it; its vocabulary is larger than the checkpoint's, as there.
    flat = {
        "model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 50,
        "max_position_embeddings": 4096, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"), "vision_end_token_id": number("<|vision_end|>"),
        "vision_config": {
            "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "model_type": "qwen2_vl",
        },
    }  # fmt: skip
    base.mkdir()
    (base / "config.json").write_text(json.dumps(flat))
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280).save_pretrained(base)

    torch.manual_seed(0)
    network = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(base))
    network.resize_token_embeddings(len(tokenizer))
    network.rm_head = nn.Linear(32, 1, bias=False)
    targets = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".visual." not in name and "head" not in name
    ]
    peft = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.05))
    for name, parameter in peft.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3 if "lora_" in name else 0.15)
    peft.eval()
    old = {}
    for name, tensor in peft.state_dict().items():
        name = name.replace("base_model.model.model.visual.", "base_model.model.visual.")
        old[name.replace("base_model.model.model.language_model.", "base_model.model.model.")] = tensor
    torch.save(old, weights / "checkpoint-7" / "model.pth")
    settings = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 448 * 448, "eval_dim": ["VQ", "MQ", "TA"]},
        "model_config": {"output_dim": 1, "use_special_tokens": True},
        "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False},
        "inference_config": {
            f"{a}_{k}": v for a, pair in NORM.items() for k, v in zip(("mean", "std"), pair, strict=True)
        },
    }
    (weights / "model_config.json").write_text(json.dumps(settings))
    template = root / "prompt_template.py"
    template.write_text(
        f"raise SystemExit('read, not run')\nOTHER = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = '''{RUBRIC}'''\n"
    )
    return {"weights": weights, "base": base, "template": template, "peft": peft, "tokenizer": tokenizer}


published = pytest.fixture(scope="module", name="published")(make_published)


def entry(published: dict[str, Any], name: str, **options: Any) -> OutcomeRewardConfig:
    given = {
        **{name: str(published[name]) for name in ("weights", "base", "template")},
        "video_fps": 4.0, "dtype": "float32", "device": "cpu", **options,
    }  # fmt: skip
    return OutcomeRewardConfig(name=name.lower(), type="videoalign", options=given)


def build(published: dict[str, Any], **options: Any) -> VideoAlignReward:
    made = build_reward(entry(published, "tested", **options))
    assert isinstance(made, VideoAlignReward)
    return made


def still_pairs(count: int = 2, seconds: int = 2) -> Tensor:
    """Videos at 2 frames a second that change every second, so that both frames of a temporal patch are equal."""
    frames = torch.rand(count, seconds, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4))
    return frames.mul(255).round().div(255).repeat_interleave(2, dim=1)


def by_the_library(published: dict[str, Any], videos: Tensor) -> Tensor:
    """Raw scores from the PEFT network that was saved, with transformers' own image processor; one video at a time."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(published["base"])
    tokenizer, network = published["tokenizer"], published["peft"].base_model.model
    rows = []
    for video, prompt in zip(videos, PROMPTS, strict=True):
        seconds = video[::2].permute(0, 2, 3, 1).mul(255).round().to(torch.uint8)
        found = processor([Image.fromarray(np.asarray(s)) for s in seconds], return_tensors="pt")
        time, (_, rows_, columns) = len(seconds), found["image_grid_thw"][0].tolist()
        video_text = "<|vision_start|>" + "<|video_pad|>" * (time * rows_ * columns // 4) + "<|vision_end|>"
        asked = RUBRIC.replace("{text_prompt}", prompt)
        text = f"<|im_start|>user\n{video_text}{asked}<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = network.model(
                input_ids=tokens,
                position_ids=torch.arange(tokens.shape[1]).expand(3, 1, -1),
                pixel_values_videos=found["pixel_values"],
                video_grid_thw=torch.tensor([[time, rows_, columns]]),
            ).last_hidden_state[0]
        places = [tokens[0].tolist().index(tokenizer.convert_tokens_to_ids(f"<|{a}_reward|>")) for a in NORM]
        rows.append(network.rm_head(hidden[places]).squeeze(1).detach())
    return torch.stack(rows)


def test_scores_are_the_saved_networks_normalised_and_weighted(published: dict[str, Any]) -> None:
    """Adapters merged, names mapped, patches, tokens and positions: all against PEFT and transformers."""
    videos = still_pairs()
    raw = by_the_library(published, videos)
    aspects = {"VQ": 0.5, "MQ": 0.5, "TA": 1.0}
    scores = build(published, video_fps=2.0, aspects=aspects).score(videos, PROMPTS)
    assert scores.dtype == torch.float32
    mean, std = (torch.tensor([NORM[a][k] for a in NORM]) for k in (0, 1))
    expected = ((raw - mean) / std) @ torch.tensor(list(aspects.values()))
    torch.testing.assert_close(scores, expected, atol=2e-4, rtol=1e-4)
    assert float((scores[0] - scores[1]).abs()) > 1e-2
    plain = build(published, video_fps=2.0, normalise=False, aspects={"MQ": 1.0}).score(videos, PROMPTS)
    torch.testing.assert_close(plain, raw[:, 1], atol=2e-4, rtol=1e-4)


def test_batches_are_padded_without_changing_scores(published: dict[str, Any]) -> None:
    videos = still_pairs()
    one = build(published, batch=1).score(videos, PROMPTS)
    two = build(published, batch=2).score(videos.clone(), PROMPTS)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert torch.equal(one, build(published, batch=1).score(videos.clone(), PROMPTS))


def test_aspects_of_one_recipe_share_the_network_and_the_forward_pass(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = build_rewards([entry(published, aspect, aspects={aspect: 1.0}) for aspect in NORM])
    videos, passes = still_pairs(), []
    forward = VideoRewardNetwork.forward
    monkeypatch.setattr(VideoRewardNetwork, "forward", lambda *args: passes.append(1) or forward(*args))
    batch = Batch(videos, PROMPTS)
    parts = [batch.score(reward) for reward in rewards.values()]
    assert len(passes) == 2  # two videos, one at a time
    for reward, part in zip(rewards.values(), parts, strict=True):
        assert torch.equal(reward.score(videos, PROMPTS), part)
    torch.testing.assert_close(sum(parts), build(published).score(videos, PROMPTS))


def test_the_prompt_and_the_motion_matter(published: dict[str, Any]) -> None:
    reward, videos = build(published, video_fps=2.0), still_pairs()
    other = reward.score(videos.clone(), ["a blue bird", PROMPTS[1]])
    first = reward.score(videos.clone(), PROMPTS)
    assert float((other[0] - first[0]).abs()) > 1e-3
    assert float((other[1] - first[1]).abs()) < 1e-4
    backwards = reward.score(videos.flip(1), PROMPTS)
    assert float((backwards - first).abs().min()) > 1e-3


def test_patches_are_what_the_vision_towers_convolution_sees() -> None:
    """The order of channels, time and pixels in a patch, against a 3-d convolution over the video."""
    video = torch.randn(4, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(5, 3, 2, 14, 14, generator=torch.Generator().manual_seed(1))
    found, grid = patches(video, patch=14, temporal=2, merge=2)
    assert grid == (2, 4, 6)
    convolved = nn.functional.conv3d(video.transpose(0, 1)[None], kernel, stride=(2, 14, 14))[0]
    # Tokens of a 2x2 block follow each other.
    blocks = convolved.reshape(5, 2, 2, 2, 3, 2).permute(1, 2, 4, 3, 5, 0).reshape(-1, 5)
    torch.testing.assert_close(found @ kernel.flatten(1).T, blocks, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("frames", "video_fps", "expected"),
    [
        (81, 16.0, 10), (81, 24.0, 6), (49, 8.0, 12), (9, 8.0, 4), (3, 8.0, 2), (2, 8.0, 2), (240, 24.0, 20),
        # 5.0 seconds at two a second are 10; 4.5 would be odd and is rounded to an even number.
        (40, 8.0, 10), (36, 8.0, 8),
    ],
)  # fmt: skip
def test_frames_are_sampled_by_the_videos_time(frames: int, video_fps: float, expected: int) -> None:
    chosen = sampled_frames(frames, video_fps, 2.0)
    assert len(chosen) == expected
    assert chosen[0] == 0
    assert chosen[-1] == frames - 1
    assert chosen == sorted(chosen)


def test_a_wrong_frame_rate_changes_what_is_looked_at(published: dict[str, Any]) -> None:
    video = torch.rand(1, 24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    slow, fast = (build(published, video_fps=fps).score(video.clone(), PROMPTS[:1]) for fps in (4.0, 24.0))
    assert float((slow - fast).abs()) > 1e-3


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 832), (336, 588)),  # scaled down to 200704 pixels
        ((720, 1280), (336, 588)), ((64, 64), (336, 336)),  # scaled up to 100352 pixels
        ((448, 448), (448, 448)), ((HEIGHT, WIDTH), (HEIGHT, WIDTH)),
    ],
)  # fmt: skip
def test_frame_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert frame_size(*size, factor=28, most_pixels=448 * 448) == expected


@pytest.mark.parametrize("size", [(480, 832), (720, 1280), (64, 64), (301, 655), (1024, 300)])
def test_frame_sizes_are_the_librarys_with_the_same_bounds(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    theirs = smart_resize(*size, factor=28, min_pixels=128 * 28 * 28, max_pixels=448 * 448)
    assert frame_size(*size, factor=28, most_pixels=448 * 448) == theirs


def test_a_text_file_is_a_template_too(published: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text(RUBRIC)
    videos = still_pairs()
    own = build(published, template=str(file)).score(videos, PROMPTS)
    torch.testing.assert_close(own, build(published).score(videos.clone(), PROMPTS))


def test_reward_tokens_in_a_prompt_are_refused(published: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must not contain the reward model's own tokens"):
        build(published).score(still_pairs(count=1), ["nice <|VQ_reward|>"])


def test_single_images_are_refused(published: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        build(published).score(torch.rand(1, 1, 3, 64, 64), ["a car"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "/none"}, "option weights: no folder '/none'"),
        ({"weights": "KwaiVGI/VideoReward"}, "option revision: 'KwaiVGI/VideoReward' is a hub id and must be pinned"),
        ({"base": "Qwen/Qwen2-VL-2B-Instruct", "base_revision": "main"}, "option base_revision: .*got 'main'"),
        ({"template": "/none.txt"}, "option template: no file '/none.txt'; give prompt_template.py of https"),
        ({"aspects": {"beauty": 1.0}}, "aspects.beauty: input should be 'VQ', 'MQ' or 'TA'"),
        ({"aspects": {}}, "aspects: dictionary should have at least 1 item"),
        ({"video_fps": 0.0}, "video_fps: input should be greater than 0, got 0.0"),
        ({"dtype": "int4"}, "dtype: input should be .*got 'int4'"),
    ],
)
def test_what_is_missing_is_named(published: dict[str, Any], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(published, **options)


def test_the_frame_rate_must_be_given(published: dict[str, Any]) -> None:
    options = {name: str(published[name]) for name in ("weights", "base", "template")}
    with pytest.raises(ConfigError, match="'video_fps' is missing"):
        build_reward(OutcomeRewardConfig(name="tested", type="videoalign", options=options))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("template.txt", b"caf\xe9", r"template\.txt is not UTF-8: byte 3 \(line 1\) is 0xe9; save the file as UTF-8"),
        ("template.py", b"x = (", r"template\.py' is no readable Python: .*; download it again, or give a text file"),
        ("template.py", b"x = 'a\0'", r"template\.py' is no readable Python"),
        ("template.py", b"x = " + b"(" * 5000, r"template\.py' is no readable Python"),
    ],
)
def test_an_unreadable_template_is_refused(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=f"option template: .*{why}"):
        read_template(tmp_path / name)


def test_a_template_with_a_byte_order_mark_is_the_same_template(published: dict[str, Any], tmp_path: Path) -> None:
    plain = read_template(published["template"])
    for name, text in (("own.txt", plain), ("own.py", published["template"].read_text())):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_template(tmp_path / name) == plain


def test_an_incomplete_template_is_refused(published: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text(RUBRIC.replace("<|MQ_reward|>", ""))
    with pytest.raises(ConfigError, match=r"must hold each of <\|MQ_reward\|> exactly once"):
        build(published, template=str(file))


def test_weights_of_another_network_are_refused(published: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    target = tmp_path / "other"
    shutil.copytree(published["weights"], target)
    state = torch.load(target / "checkpoint-7" / "model.pth", weights_only=True)
    del state["base_model.model.model.norm.weight"]
    torch.save(state, target / "checkpoint-7" / "model.pth")
    with pytest.raises(ConfigError, match=r"does not fit VideoRewardNetwork: missing \['backbone.language_model.norm"):
        build(published, weights=str(target))
    (target / "checkpoint-7" / "model.pth").unlink()
    with pytest.raises(ConfigError, match=r"holds no checkpoint-\*/model.pth"):
        build(published, weights=str(target))
