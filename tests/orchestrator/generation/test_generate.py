"""``euphonium generate``: what draws, at which size, into which files, and that it goes on where it was killed."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from euphonium.config import RunConfig
from euphonium.generators.registry import open_generator
from euphonium.generators.sample_size import SIZE_FILE
from orchestrator.commands.cli import run_command
from orchestrator.generation.clips import read_clip
from orchestrator.generation.models import RunModel
from orchestrator.generation.policies import open_policy
from orchestrator.generation.samples import Sample
from orchestrator.state.checkpoints import Checkpoint, RunState
from tests.euphonium.generators.cases import CASES

PROMPT = "a red car moving left on a white background"
OTHER = "a blue fish moving up on a gray background"


def exported(config: RunConfig, target: Path) -> Path:
    family = open_generator(config.model)
    state = {name: tensor for file in family.transformer_files() for name, tensor in load_file(file).items()}
    family.export(state, target)
    return target


def generate(model: Path | str, output: Path, *options: str) -> int:
    return run_command(["generate", str(model), "--steps", "1", "-o", str(output), *options])


@pytest.fixture
def a_run(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that opens as a run whose policy is the untrained generator."""
    config = make_config()
    state = RunState(iteration=1, next_group=2, world_size=1)
    monkeypatch.setattr(
        "orchestrator.generation.models.open_checkpoint", lambda _: (Checkpoint(tmp_path, state), config)
    )
    monkeypatch.setattr(
        "orchestrator.generation.models.open_policy", lambda c, config, **k: open_policy(c, config, base=True)
    )
    return tmp_path


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_sounds_are_written_beside_their_clips(folders: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    # Of one step its scheduler makes none.
    how = ("--frames", "5", "--height", "32", "--width", "32", "--steps", "2")
    assert generate(folders("LTX2Pipeline"), tmp_path / "clips", "-p", PROMPT, "--format", kind, *how) == 0
    clip = "0000-0" if kind == "png" else "0000-0.gif"
    assert {path.name for path in (tmp_path / "clips").iterdir()} >= {clip, "0000-0.wav"}
    with wave.open(str(tmp_path / "clips" / "0000-0.wav")) as file:
        assert file.getnchannels() == 2
        assert np.frombuffer(file.readframes(-1), dtype="<i2").any()


def test_a_run_draws_sounds_with_its_clips(
    make_config: Callable[..., RunConfig], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    config = make_config(
        f"model.path={folders('LTX2Pipeline')}", "model.frames=5", "model.cfg_scale=4", "model.embedded_guidance=null",
        "evaluation.num_steps=2", "rewards.process=null", "sampler.guidance=null", "advantage.mode=outcome",
    )  # fmt: skip
    state = RunState(iteration=1, next_group=2, world_size=1)
    policy = open_policy(Checkpoint(tmp_path, state), config, base=True)
    clip, other = RunModel(policy).draw([Sample(f"{seed}.gif", PROMPT, seed) for seed in (0, 1)])
    assert clip.frames.shape == (5, 32, 32, 3)
    assert clip.sound is not None
    assert other.sound is not None
    assert clip.sound.samples.shape[0] == 2
    assert not torch.equal(clip.sound.samples, other.sound.samples)


def test_an_export_is_drawn_from_in_its_runs_size_wherever_it_lies(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder = exported(make_config(), tmp_path / "far" / "away")
    assert json.loads((folder / SIZE_FILE).read_text()) == {"height": 32, "width": 32, "frames": 9}
    assert generate(folder, tmp_path / "clips", "-p", PROMPT, "--format", "png") == 0
    assert read_clip(tmp_path / "clips" / "0000-0").shape == (9, 32, 32, 3)
    options = ("--height", "48", "--width", "64", "--frames", "5", "--format", "png")
    shutil.copytree(folder, tmp_path / "copy")
    assert generate(tmp_path / "copy", tmp_path / "other", "-p", PROMPT, *options) == 0
    assert read_clip(tmp_path / "other" / "0000-0").shape == (5, 48, 64, 3)


@pytest.mark.parametrize("held", ["", '{"height": 32, "width": -1, "frames": 9}'])
def test_a_damaged_size_is_refused(
    held: str, make_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = exported(make_config(), tmp_path / "export")
    (folder / SIZE_FILE).write_text(held)
    assert generate(folder, tmp_path / "clips", "-p", PROMPT) == 2
    error = capfd.readouterr().err
    assert "euphonium.json does not hold the size" in error
    assert "give --height" in error
    assert not (tmp_path / "clips").exists()


def test_what_a_pipeline_cannot_draw_is_refused(
    folders: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, videos, edits, modular = (
        folders(CASES[name].pipeline_class) for name in ("sd1", "skyreels", "qwen edit", "minimax h3")
    )
    for model, options, message in (
        (images, ["--frames", "5"], "makes images"),
        (images, ["--height", "0"], "--height: must be above 0"),
        (images, ["--base"], "--base: "),
        (images, ["--protocol", "inference_rgg"], "needs the process reward model"),
        (images, ["--adapter", str(tmp_path)], "holds no pytorch_lora_weights.safetensors"),
        (videos, [], "needs an image with each prompt"),
        (edits, [], "needs an image with each prompt"),
        (modular, [], "is a MiniMaxH3ModularPipeline, a modular pipeline"),
        ("nobody/nothing", [], "could not be downloaded"),
    ):
        assert generate(model, tmp_path / "c", "-p", PROMPT, *options) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_run_is_drawn_in_other_sizes_and_goes_on(
    a_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "suite.txt"
    prompts.write_text(f"{PROMPT}\n{OTHER}")
    options = ("-f", str(prompts), "--seeds", "3,9", "--height", "48", "--frames", "5", "--format", "png")
    clips = tmp_path / "clips"
    assert generate(a_run, clips, *options) == 0
    files = sorted(path.name for path in clips.iterdir())
    drawn = ["0000-0", "0000-1", "0001-0", "0001-1"]
    assert files == [*drawn, "contact_sheet.png", "index.json"]
    first = {name: read_clip(clips / name) for name in drawn}
    assert first["0000-0"].shape == (5, 48, 32, 3)
    assert not np.array_equal(first["0000-0"], first["0000-1"])
    assert sorted(path.name for path in (clips / "0000-0").iterdir()) == [f"{i:04d}.png" for i in range(5)]
    # A killed command leaves whole clips: the others are drawn, the same as before.
    shutil.rmtree(clips / "0001-0")
    kept = (clips / "0000-1").stat().st_mtime_ns
    capfd.readouterr()
    assert generate(a_run, clips, *options) == 0
    assert "3 of 4 clips are there" in capfd.readouterr().out
    assert np.array_equal(read_clip(clips / "0001-0"), first["0001-0"])
    assert (clips / "0000-1").stat().st_mtime_ns == kept


def test_a_folder_keeps_its_settings(a_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(a_run, tmp_path / "c", "-p", PROMPT) == 0
    for options, message in (
        (["-p", OTHER], "is of another prompt or seed"),
        (["-p", PROMPT, "--seed", "4"], "is of another prompt or seed"),
        (["-p", PROMPT, "--frames", "5"], "drawn with size: None, not {'frames': 5}"),
        (["-p", PROMPT, "--base"], "were drawn with model: "),
        (["-p", PROMPT, "--format", "png"], "were drawn with format: gif, not frames"),
    ):
        assert generate(a_run, tmp_path / "c", *options) == 2
        assert message in capfd.readouterr().err
    # More prompts are added to what is there.
    assert generate(a_run, tmp_path / "c", "-p", PROMPT, "-p", OTHER) == 0
    assert len(json.loads((tmp_path / "c" / "index.json").read_text())["samples"]) == 2
    (tmp_path / "c" / "index.json").unlink()
    assert generate(a_run, tmp_path / "c", "-p", PROMPT) == 2
    assert "no index.json says how it was drawn" in capfd.readouterr().err


def test_options_that_make_no_sense_are_refused(a_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ([], "there is nothing to draw"),
        (["-p", PROMPT, "--seeds", "1,x"], "--seeds '1,x'"),
        (["-p", PROMPT, "--dtype", "bfloat16"], "--dtype: "),
        (["-p", PROMPT, "--guidance-scale", "3"], "which has its own"),
        (["-p", PROMPT, "--height", "33"], "needs a multiple of"),
        (["-p", PROMPT, "--layout", "geneval"], "lacks the keys tag and include"),
    ):
        assert generate(a_run, tmp_path / "c", *options) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "c").exists()


def test_vbench_gets_nothing_but_its_clips(a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "color.txt").write_text(PROMPT)
    options = ("-f", str(tmp_path / "color.txt"), "--layout", "vbench", "--samples-per-prompt", "2")
    assert generate(a_run, tmp_path / "c", *options) == 0
    # VBench takes the ending of the first file that it lists for that of all.
    assert sorted(p.name for p in (tmp_path / "c" / "videos").iterdir()) == [f"{PROMPT}-{j}.mp4" for j in range(2)]


def test_images_with_an_adapter_in_geneval_s_layout(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = folders("StableDiffusion3Pipeline")
    transformer = StableDiffusion3Pipeline.from_pretrained(folder).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(transformer))
    entry = {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": PROMPT}
    (tmp_path / "meta.jsonl").write_text(json.dumps(entry))
    common = ("-f", str(tmp_path / "meta.jsonl"), "--layout", "geneval", "--samples-per-prompt", "2", "--batch", "2",
              "--height", "32", "--width", "32")  # fmt: skip
    assert generate(folder, tmp_path / "plain", *common) == 0
    assert generate(folder, tmp_path / "adapted", *common, "--adapter", str(tmp_path / "lora")) == 0
    place = Path("images/00000/samples/00001.png")
    one, other = (np.asarray(Image.open(tmp_path / name / place)) for name in ("plain", "adapted"))
    assert one.shape == (32, 32, 3)
    assert not np.array_equal(one, other)
    assert json.loads((tmp_path / "plain/images/00000/metadata.jsonl").read_text()) == entry
    # Zero second factors change nothing.
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    zeroed = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in weights.items()}
    save_file(zeroed, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert generate(folder, tmp_path / "nothing", *common, "--adapter", str(tmp_path / "lora")) == 0
    assert np.array_equal(one, np.asarray(Image.open(tmp_path / "nothing" / place)))


def test_image_to_video_takes_pictures_from_its_prompt_file(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders(CASES["skyreels"].pipeline_class), folder)
    # A fresh network's output hardly depends on what it is told.
    (weights,) = (folder / "transformer").glob("*.safetensors")
    state = load_file(weights)
    state["proj_out.weight"] = torch.randn(state["proj_out.weight"].shape, generator=torch.Generator().manual_seed(0))
    save_file(state, weights, metadata={"format": "pt"})
    size = ("--height", "32", "--width", "32", "--frames", "5", "--format", "png")
    for seed, name in enumerate("ab"):
        picture = np.random.default_rng(seed).integers(256, size=(48, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": f"{name}.png"}))
        assert generate(folder, tmp_path / name / "c", "-f", str(tmp_path / f"{name}.jsonl"), *size) == 0
    one, other = (read_clip(tmp_path / name / "c" / "0000-0") for name in "ab")
    assert one.shape[1:] == (32, 32, 3)
    assert not np.array_equal(one, other)


@pytest.mark.ray
def test_tasks_draw_the_same_clips(ray_cluster: None, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = exported(make_config(), tmp_path / "export")
    options = ("-p", PROMPT, "-p", OTHER, "--samples-per-prompt", "2", "--format", "png")
    assert generate(folder, tmp_path / "here", *options) == 0
    assert generate(folder, tmp_path / "tasks", *options, "--workers", "2", "--threads", "1") == 0
    for name in ("0000-0", "0000-1", "0001-0", "0001-1"):
        assert np.array_equal(read_clip(tmp_path / "here" / name), read_clip(tmp_path / "tasks" / name))


def test_what_a_pipeline_raises_is_one_line_with_its_size(
    folders: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tall = ("-p", PROMPT, "--height", "1056", "--width", "32", "--frames", "5")
    assert generate(folders("WanPipeline 2.2"), tmp_path / "clips", *tall) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "error: diffusers' WanPipeline fails at {'height': 1056, 'width': 32, 'num_frames': 5}: Runtime"
    )
    assert "--height, --width and --frames" in line
