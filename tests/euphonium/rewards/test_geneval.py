"""GenEval-style detection: verdicts by hand, the detector against transformers' own, both on tiny networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.detection import Found, InstanceDetector
from euphonium.rewards.geneval import COLOURS, GenEvalReward, judge, relations
from euphonium.rewards.pretrained import PretrainedOptions
from euphonium.rewards.registry import build_reward
from tests.euphonium.rewards.test_clip import make_clip

CLASSES = ("cat", "dog", "mouse", "car")
SIDE = 384


class NoLoss(torch.nn.Module):
    """Stands where the published class has its loss; of its state a checkpoint keeps this."""

    def __init__(self, config: Any, weight_dict: object) -> None:
        super().__init__()
        self.num_labels, self.eos_coef = config.num_labels, config.no_object_weight
        self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))


@pytest.fixture(scope="module", autouse=True)
def without_loss() -> Iterator[None]:
    """The published class builds its loss, which takes a library that nothing else here does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.mask2former.modeling_mask2former.Mask2FormerLoss", NoLoss)
        yield


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of the published kind (Swin), a few thousand times smaller, with random weights."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        id2label=dict(enumerate(CLASSES)), label2id={name: n for n, name in enumerate(CLASSES)},
    )  # fmt: skip
    torch.manual_seed(0)
    network = Mask2FormerForUniversalSegmentation(config)
    for name, parameter in network.named_parameters():
        if "class_predictor" in name or "mask_embedder" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    folder = tmp_path_factory.mktemp("mask2former")
    network.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, do_resize=True).save_pretrained(folder)
    return folder


clip_folder = pytest.fixture(scope="module", name="clip_folder")(make_clip)


def picture(seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


def test_objects_are_those_of_transformers_own_postprocessing(detector_folder: Path) -> None:
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    detector = InstanceDetector(PretrainedOptions(weights=str(detector_folder), dtype="float32"))
    shown = picture()
    found = detector.find(shown)
    processor = Mask2FormerImageProcessorPil.from_pretrained(detector_folder)
    network = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder).eval()
    pixels = (shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with torch.no_grad():
        output = network(pixel_values=processor(images=[pixels], return_tensors="pt")["pixel_values"])
    # It keeps as many instances as there are queries, at least as sure as the threshold, on 384 x 384 pixels.
    theirs = processor.post_process_instance_segmentation(output, threshold=1e-6, return_binary_maps=True)[0]
    wanted = {
        (CLASSES[info["label_id"]], round(info["score"], 4)): mask.bool()
        for info, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True)
    }
    ours = {(one.name, round(one.confidence, 4)): one for one in found}
    assert len(wanted) > 5
    assert wanted.keys() <= ours.keys()
    for key, mask in wanted.items():
        assert torch.equal(ours[key].mask, mask)
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert ours[key].box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [one.confidence for one in found] == sorted((one.confidence for one in found), reverse=True)


def at(left: float, top: float, side: float = 10, name: str = "cat") -> Found:
    return Found(name, 0.9, (left, top, left + side, top + side), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("box", "other", "wanted"),
    [
        ((60, 40, 70, 50), (0, 40, 10, 50), {"right of"}),
        ((40, 0, 50, 10), (40, 60, 50, 70), {"above"}),
        ((40, 60, 50, 70), (40, 0, 50, 10), {"below"}),
        ((60, 60, 70, 70), (0, 0, 10, 10), {"right of", "below"}),
        ((40, 40, 50, 50), (41, 40, 51, 50), set()),
    ],
)
def test_relations_are_seen_from_the_other_box(box: Sequence[float], other: Sequence[float], wanted: set[str]) -> None:
    assert relations(box, other) == wanted


def colour(one: Found, _: str) -> str:
    """Objects further to the right than 50 are red."""
    return "red" if one.box[0] > 50 else "blue"


CAT, DOG = [at(0, 0), at(60, 0), at(80, 0)], [at(0, 60, name="dog")]
ENTRIES: list[tuple[dict[str, Any], list[bool]]] = [
    ({"include": [{"class": "cat", "count": 1}]}, [True]),
    ({"include": [{"class": "cat", "count": 4}]}, [False]),
    ({"include": [{"class": "car", "count": 1}, {"class": "dog", "count": 1}]}, [False, True]),
    # Exactly three: four of them must not be there.
    ({"include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]}, [True, True]),
    ({"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}, [True, False]),
    # Of the surest objects alone colours are told.
    ({"include": [{"class": "cat", "count": 1, "color": "blue"}]}, [True, True]),
    ({"include": [{"class": "cat", "count": 1, "color": "red"}]}, [True, False]),
    ({"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["below", 0]}]},
     [True, True, True]),
    ({"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]},
     [True, True, False]),
    # What is missing is below nothing.
    ({"include": [{"class": "car", "count": 1}, {"class": "dog", "count": 1, "position": ["below", 0]}]},
     [False, True, False]),
    # Nor is anything beside an object of another colour.
    ({"include": [{"class": "cat", "count": 1, "color": "red"},
                  {"class": "dog", "count": 1, "position": ["below", 0]}]},
     [True, False, True, False]),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "met"), ENTRIES)
def test_verdicts_follow_the_entry(entry: dict[str, Any], met: list[bool]) -> None:
    verdict = judge(entry, {"cat": CAT, "dog": DOG}, colour)
    assert verdict.met == met
    assert verdict.correct == all(met)
    assert verdict.share == sum(met) / len(met)


def reward(detector_folder: Path, clip: Path | None = None, **options: Any) -> GenEvalReward:
    given = {"weights": str(detector_folder), "threshold": 1e-4, **options} | ({"clip": str(clip)} if clip else {})
    made = build_reward(OutcomeRewardConfig(name="geneval", type="geneval", options=given))
    assert isinstance(made, GenEvalReward)
    return made


def test_scores_are_verdicts_on_what_the_networks_see(detector_folder: Path, clip_folder: Path) -> None:
    shown = picture(1, 64)
    detector = InstanceDetector(PretrainedOptions(weights=str(detector_folder), dtype="float32"))
    seen = {name: sum(one.name == name for one in detector.find(shown) if one.confidence > 1e-4) for name in CLASSES}
    name, count = max(seen.items(), key=lambda item: item[1])
    assert count > 0
    judged = reward(detector_folder, clip_folder)
    right = {"include": [{"class": name, "count": count}], "exclude": [{"class": name, "count": count + 1}]}
    wrong = {"include": [{"class": name, "count": count + 1}], "exclude": [{"class": name, "count": count + 1}]}
    videos = shown.expand(2, 3, 3, 64, 64).contiguous()
    assert judged.score(videos, ["p", "q"], [right, wrong]).tolist() == [1.0, 0.0]
    partly = reward(detector_folder, score="partial").score(videos, ["p", "q"], [right, wrong])
    assert partly.tolist() == [1.0, 0.5]
    # Of all colours it is exactly one.
    coloured = [{"include": [{"class": name, "count": 1, "color": colour}]} for colour in COLOURS]
    videos = shown.expand(len(COLOURS), 1, 3, 64, 64).contiguous()
    assert judged.score(videos, list(COLOURS), coloured).sum() == 1


def test_the_names_of_geneval_are_known(detector_folder: Path) -> None:
    entry = {"include": [{"class": "computer mouse", "count": 1}]}
    assert reward(detector_folder).score(torch.zeros(1, 1, 3, 64, 64), ["p"], [entry]).item() in (0.0, 1.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "has no entry with include or exclude"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "names the class 'unicorn'"),
        ({"include": [{"class": "cat", "count": 1, "color": "red"}]}, "needs the option clip"),
    ],
)
def test_what_cannot_be_judged_is_no_zero(entry: dict[str, Any], message: str, detector_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        reward(detector_folder).score(torch.zeros(1, 1, 3, 64, 64), ["p"], [entry])


def test_another_architecture_is_refused(clip_folder: Path, detector_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a clip, not a mask2former"):
        reward(clip_folder)
    with pytest.raises(ConfigError, match="option clip: "):
        reward(detector_folder, tmp_path)
