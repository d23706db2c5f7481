"""Names of clips, as the evaluations of suites look for them, and their seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from euphonium.errors import ConfigError
from euphonium.prompt_files import Prompt
from orchestrator.generation.samples import Seeds, SuitePrompt, plan_samples, read_suite, texts


def suite_of(tmp_path: Path, **files: str) -> list[SuitePrompt]:
    for name, contents in files.items():
        (tmp_path / name.replace("__", ".")).write_text(contents)
    return read_suite([tmp_path])


def test_plain_names_count_prompts_and_samples() -> None:
    plan = plan_samples(texts(["a", "b"]), "plain", "gif", Seeds(10, samples=2))
    assert [(s.file, s.prompt, s.seed) for s in plan.samples] == [
        ("0000-0.gif", "a", 10), ("0000-1.gif", "a", 11), ("0001-0.gif", "b", 12), ("0001-1.gif", "b", 13)
    ]  # fmt: skip
    each = plan_samples(texts(["a", "b"]), "plain", "gif", Seeds(each=(7, 3)))
    assert [s.seed for s in each.samples] == [7, 3, 7, 3]
    assert len(plan_samples(texts(["a", "b"]), "plain", "png", Seeds()).samples) == 2


def test_vbench_finds_clips_by_their_prompts(tmp_path: Path) -> None:
    suite = suite_of(
        tmp_path, color__txt="a red car\na green car", temporal_flickering__txt="a pond", scene__txt="a red car"
    )
    files = [s.file for s in plan_samples(suite, "vbench", "mp4", Seeds()).samples]
    # A prompt of two dimensions is one clip; flickering wants 25 of each.
    assert sorted(files) == sorted(
        [f"videos/a {c} car-{j}.mp4" for c in ("red", "green") for j in range(5)]
        + [f"videos/a pond-{j}.mp4" for j in range(25)]
    )
    seeds = [s.seed for s in plan_samples(suite, "vbench", "mp4", Seeds(3)).samples]
    assert seeds == list(range(3, 3 + 35))


def test_vbench_2_keeps_dimensions_apart_and_cuts_names(tmp_path: Path) -> None:
    long = "a " + "very " * 60 + "long road"
    suite = suite_of(tmp_path, Camera_Motion__txt=f"Garden, zoom in.\n{long}", Diversity__txt="Garden, zoom in.")
    files = [s.file for s in plan_samples(suite, "vbench2", "mp4", Seeds()).samples]
    assert [f for f in files if "Camera" in f][:3] == [
        f"videos/Camera_Motion/Garden, zoom in.-{j}.mp4" for j in range(3)
    ]
    assert f"videos/Camera_Motion/{long[:180]}-2.mp4" in files
    assert sum("videos/Diversity/" in f for f in files) == 20
    # The same from VBench's own table, which says each prompt's dimension.
    table = [{"prompt_en": "Garden, zoom in.", "dimension": ["Diversity"], "video_list": []}]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(table))
    entries = read_suite([tmp_path / "VBench_full_info.json"])
    assert [e.prompt.text for e in entries] == ["Garden, zoom in."]
    assert len(plan_samples(entries, "vbench2", "mp4", Seeds()).samples) == 20


def test_a_longer_wording_is_drawn_under_the_short_name(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a red car, sharp, cinematic", "prompt_en": "a red car"})
    suite = suite_of(tmp_path, color__jsonl=line)
    (sample,) = plan_samples(suite, "vbench", "mp4", Seeds(samples=1)).samples
    assert (sample.file, sample.prompt) == ("videos/a red car-0.mp4", "a red car, sharp, cinematic")


@pytest.mark.parametrize("prompt", ["1/2 cup", "ü" * 130])
def test_a_prompt_that_names_no_file_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match=r'no file can be called.*"prompt_en"'):
        plan_samples(texts([prompt]), "vbench", "mp4", Seeds())


def test_geneval_has_the_prompts_entry_beside_numbered_images(tmp_path: Path) -> None:
    entry = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    suite = suite_of(tmp_path, evaluation_metadata__jsonl=json.dumps(entry) + "\n" + json.dumps(entry))
    plan = plan_samples(suite, "geneval", "png", Seeds())
    assert [s.file for s in plan.samples][3:5] == ["images/00000/samples/00003.png", "images/00001/samples/00000.png"]
    assert len(plan.samples) == 8
    assert json.loads(plan.beside["images/00001/metadata.jsonl"]) == entry
    with pytest.raises(ConfigError, match="lacks the keys tag and include"):
        plan_samples(texts(["two cats"]), "geneval", "png", Seeds())


def test_impossible_seeds_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seeds gives 2"):
        Seeds(each=(1, 2), samples=3)
    with pytest.raises(ConfigError, match="given twice"):
        Seeds(each=(1, 1))
    with pytest.raises(ConfigError, match="holds no prompt files"):
        read_suite([tmp_path])
    assert plan_samples([SuitePrompt(Prompt("a", tmp_path / "x.png"), None)], "plain", "gif", Seeds()).samples[0].image
