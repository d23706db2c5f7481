"""``euphonium compare`` and ``tally``: the same noise on both sides, and what people answer on the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from euphonium.config import RunConfig
from euphonium.generators.registry import open_generator
from orchestrator.commands.cli import run_command
from orchestrator.comparison.models import differences
from orchestrator.generation.clips import read_clip
from orchestrator.state.checkpoints import Checkpoint, RunState

NODE = shutil.which("node")


@pytest.fixture
def a_run(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run whose checkpoint holds weights that differ a little from the generator's."""
    config = make_config("evaluation.samples_per_prompt=2")
    family = open_generator(config.model)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for file in family.transformer_files()
        for name, tensor in load_file(file).items()
    }
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(state, folder / "policy.safetensors")
    checkpoint = Checkpoint(folder, RunState(iteration=1, next_group=2, world_size=1))
    monkeypatch.setattr("orchestrator.comparison.models.open_checkpoint", lambda _: (checkpoint, config))
    return folder


def compare(one: Path | str, other: Path | str, output: Path, *options: str) -> int:
    return run_command(["compare", str(one), str(other), "-o", str(output), "--steps", "2", *options])


def test_a_run_against_its_beginning(a_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    assert compare("base", a_run, folder) == 0
    out = capfd.readouterr().out
    assert re.search(r"total: .* difference [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\], b better in \d+%", out)
    result = json.loads((folder / "comparison.json").read_text())
    assert [result[side]["name"] for side in "ab"] == ["base", str(a_run)]
    assert len(result["pairs"]) == 4
    # The reported difference is that of the rewards that are told sample by sample.
    gained = [pair["rewards"]["b"]["icon"] - pair["rewards"]["a"]["icon"] for pair in result["pairs"]]
    assert result["rewards"]["icon"]["difference"]["mean"] == pytest.approx(np.mean(gained))
    for pair in result["pairs"]:
        one, other = (read_clip(folder / pair[side]) for side in "ab")
        assert not np.array_equal(one, other)
    assert compare("base", a_run, folder) == 2
    assert "is not empty; choose another folder" in capfd.readouterr().err


def test_a_model_against_itself_differs_in_nothing(a_run: Path, tmp_path: Path, make_config: Any) -> None:
    # The same generator once as where the run began, and once as a pipeline of its own: the same noise, so equal.
    copy = tmp_path / "copy"
    shutil.copytree(make_config().model.path, copy)
    other = tmp_path / "prompts.txt"
    other.write_text("a red car moving left on a white background\na blue fish moving up on a gray background")
    assert compare("base", a_run, tmp_path / "x", "-f", str(other)) == 0
    assert compare(a_run, copy, tmp_path / "y", "-f", str(other), "--samples-per-prompt", "2") == 0
    x, y = (json.loads((tmp_path / name / "comparison.json").read_text())["pairs"] for name in "xy")
    for one, same in zip(x, y, strict=True):
        assert (one["prompt"], one["seed"]) == (same["prompt"], same["seed"])
        for side, swapped in ("ab", "ba"):
            assert one["rewards"][side] == pytest.approx(same["rewards"][swapped], abs=1e-5)
        assert one["rewards"]["a"]["icon"] != pytest.approx(one["rewards"]["b"]["icon"], abs=1e-5)


def test_two_pipelines_have_no_rewards(tmp_path: Path, make_config: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_config().model.path
    assert compare(path, path, tmp_path / "c") == 2
    assert "one of the two has to be a run or checkpoint" in capfd.readouterr().err


def test_models_with_other_latents_are_refused(
    a_run: Path, tmp_path: Path, folders: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert compare(a_run, folders("WanPipeline"), tmp_path / "c") == 2
    assert "have no noise in common" in capfd.readouterr().err


def test_equal_rewards_are_half_a_win() -> None:
    one, other = (np.array(values, np.float32) for values in ([0, 1, 2, 5], [1, 1, 3, 4]))
    found = differences([{"r": one}, {"r": other, "s": other}], ["p", "p", "q", "q"])
    assert set(found) == {"r"}
    assert found["r"]["difference"] == {"mean": 0.25, "low": 0.0, "high": 0.5}
    assert found["r"]["b_better"] == {"mean": 0.625, "low": 0.5, "high": 0.75}


@pytest.fixture
def compared(a_run: Path, tmp_path: Path) -> Path:
    assert compare("base", a_run, tmp_path / "c", "--question", "Which </script> is <b>better</b>?") == 0
    return tmp_path / "c"


def answers(page: Path, judge: str, choose: str) -> dict[str, Any]:
    """What the page's own script makes of a judge who answers by a rule, written in JavaScript."""
    program = """
        const page = require("fs").readFileSync(process.argv[1], "utf8");
        const data = JSON.parse(page.match(/<script id="data"[^>]*>([^]*?)<\\/script>/)[1]);
        const script = page.match(/<script>([^]*?)<\\/script>/)[1];
        let state = 7;
        const random = () => (state = (state * 16807) % 2147483647) / 2147483647;
        const run = new Function("data", "random", script + `
            let study = new Study(data, ${JSON.stringify(process.argv[2])}, null, random);
            study.answer("left", 1); study.back();
            while (!study.done) {
                study.answer((() => { ${process.argv[3]} })(), 1.26);
                study = new Study(data, study.judge, JSON.parse(JSON.stringify(study.saved())), random);
            }
            study.answer("left", 1);
            return study.result();`);
        console.log(JSON.stringify(run(data, random)));
    """
    assert NODE is not None
    done = subprocess.run([NODE, "-e", program, str(page), judge, choose], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_page_stands_alone(compared: Path) -> None:
    page = (compared / "judge.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']|https?://", page.split("</style>")[1].split('id="data"')[0])
    data = json.loads(re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)[0])
    assert data["question"] == "Which </script> is <b>better</b>?"
    assert len(data["pairs"]) == 4
    assert all(pair[side].startswith("data:video/mp4;base64,") for pair in data["pairs"] for side in "ab")


@pytest.mark.skipif(NODE is None, reason="runs the page's script, which takes node")
def test_what_judges_download_is_counted(compared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = compared / "judge.html"
    rules = {
        "Ann": 'return study.side("left") === "b" ? "left" : "right";',
        "Bob": 'if (study.pair === 0) return "tie"; return study.side("left") === "b" ? "left" : "right";',
        "Cat": 'return "left";',
    }
    files = []
    for judge, rule in rules.items():
        files.append(tmp_path / f"{judge}.json")
        files[-1].write_text(json.dumps(answers(page, judge, rule)))
    capfd.readouterr()
    assert run_command(["tally", str(compared), str(files[0]), str(files[1])]) == 0
    found = json.loads(capfd.readouterr().out)["tally"]
    assert (found["judges"], found["judgements"], found["a"], found["b"], found["tie"]) == (2, 8, 0, 7, 1)
    assert found["b_better"]["mean"] == pytest.approx(7.5 / 8)
    assert found["b_better"]["high"] == 1.0
    assert found["agreement"] == 0.75
    assert 0 < found["left"] < 1, "sides are drawn"
    assert run_command(["tally", str(compared), str(files[2])]) == 0
    found = json.loads(capfd.readouterr().out)["tally"]
    assert found["left"] == 1.0
    assert found["agreement"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "other"}, "of another comparison"),
        ({"judgements": [{"pair": 9, "choice": "a", "left": "a"}]}, "no judgement of this comparison"),
        ({"judgements": [{"pair": 0, "choice": "c", "left": "a"}]}, "no judgement of this comparison"),
        ({"judgements": [{"pair": 0, "choice": "a", "left": "a"}] * 2}, "judged a pair twice"),
        ({"judgements": []}, "nobody has judged"),
        ({"judgements": None}, "holds no judgements"),
    ],
)
def test_answers_that_are_none_of_this_comparison_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "p", "a": "a/0.gif", "b": "b/0.gif"}
    named = {side: {"name": side, "model": side} for side in "ab"}
    (tmp_path / "comparison.json").write_text(json.dumps({"study": "s", **named, "pairs": [pair]}))
    good = {"study": "s", "judge": "Ann", "judgements": [{"pair": 0, "choice": "a", "left": "a"}]}
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "bad.json").write_text(json.dumps(good | change))
    assert run_command(["tally", str(tmp_path), str(tmp_path / "good.json")]) == 0
    assert run_command(["tally", str(tmp_path), str(tmp_path / "bad.json")]) == 2
    assert message in capfd.readouterr().err
    assert run_command(["tally", str(tmp_path), *[str(tmp_path / "good.json")] * 2]) == 2
    assert "are both by 'Ann'" in capfd.readouterr().err
