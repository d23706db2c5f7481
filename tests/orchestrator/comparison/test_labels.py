"""From drawn clips to preferences: the sheet that people fill in, and judgements of a comparison."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from learners.rewards.preference_files import read_preferences
from learners.rewards.video_files import read_frames
from orchestrator.commands.cli import run_command
from orchestrator.generation.clips import ClipFormat, save_clip

PROMPTS = ["a red car", 'a sign that says "Open, daily"; bright']


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Three clips each of two prompts, as ``generate`` leaves them."""
    folder = tmp_path / "clips"
    samples = []
    for i, prompt in enumerate(PROMPTS):
        for j in range(3):
            # Frames that are alike would be one in a GIF.
            frames = np.stack([np.full((16, 16, 3), 40 * i + 20 * j + f, np.uint8) for f in (0, 9)])
            save_clip(frames, folder / f"{i:04d}-{j}.gif", ClipFormat("gif", 8.0))
            samples.append({"file": f"{i:04d}-{j}.gif", "prompt": prompt, "seed": 3 * i + j})
    (folder / "index.json").write_text(json.dumps({"settings": {}, "samples": samples}))
    return folder


def fill(folder: Path, labels: Sequence[str], separator: str = ",") -> None:
    """Fills the sheet in as a spreadsheet program would, and writes it as that program might."""
    with (folder / "labels.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    for row, label in zip(rows[1:], labels, strict=True):
        row[3] = label
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


@pytest.mark.parametrize("separator", [",", ";"])
def test_labels_of_good_and_bad_become_labelled_samples(clips: Path, tmp_path: Path, separator: str) -> None:
    assert run_command(["label", str(clips)]) == 0
    fill(clips, ["1", "0", "", "0", "1", "1"], separator)
    out = tmp_path / "of" / "people.jsonl"
    assert run_command(["preferences", str(clips), "-o", str(out)]) == 0
    table = read_preferences(out, "preferences.train")
    assert table.prompts == PROMPTS
    assert sorted(table.label.tolist()) == [0, 0, 1, 1, 1]
    # Of a prompt every good one with every bad one.
    assert [[table.files[i].name for i in pair] for pair in table.pairs] == [
        ["0000-0.gif", "0000-1.gif"], ["0001-1.gif", "0001-0.gif"], ["0001-2.gif", "0001-0.gif"]
    ]  # fmt: skip
    assert read_frames(table.files[0]).shape[0] == 2


def test_numbers_become_pairs_and_ties(clips: Path, tmp_path: Path) -> None:
    assert run_command(["label", str(clips)]) == 0
    fill(clips, ["3", "5", "3", "", "2,5", ""])
    assert run_command(["preferences", str(clips), "-o", str(tmp_path / "p.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    told = {(Path(line["winner"]).name, Path(line["loser"]).name, line.get("tie", False)) for line in lines}
    assert told == {("0000-1.gif", "0000-0.gif", False), ("0000-1.gif", "0000-2.gif", False),
                    ("0000-0.gif", "0000-2.gif", True)}  # fmt: skip
    read_preferences(tmp_path / "p.jsonl", "preferences.train")


def test_a_sheet_that_is_made_anew_keeps_its_labels(clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["label", str(clips)]) == 0
    assert "0 of 6 clips are labelled" in capfd.readouterr().out
    fill(clips, ["1", "", "", "", "", "0"])
    assert run_command(["label", str(clips)]) == 0
    assert "2 of 6 clips are labelled" in capfd.readouterr().out
    assert (clips / "labels.csv").read_text(encoding="utf-8-sig").count(",1\n") == 1


@pytest.mark.parametrize(
    ("labels", "message"), [([""] * 6, "has no label yet"), (["good", *[""] * 5], "the label of 0000-0.gif is 'good'")]
)
def test_a_sheet_that_says_nothing_is_refused(
    labels: list[str], message: str, clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["label", str(clips)]) == 0
    fill(clips, labels)
    assert run_command(["preferences", str(clips), "-o", str(tmp_path / "p.jsonl")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


def test_what_is_no_sheet_of_these_clips_is_refused(
    clips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "p.jsonl")]
    for contents, message in (
        ("a,b\n1,2\n", "has no columns file and label"),
        ("file,label\nother.gif,1\n", "line 2 of"),
    ):
        (clips / "labels.csv").write_text(contents)
        assert run_command(["preferences", str(clips), *out]) == 2
        assert message in capfd.readouterr().err
    (clips / "labels.csv").write_text("file,label\n0000-0.gif,1\n")
    assert run_command(["preferences", str(clips), "-o", str(tmp_path / "p.txt")]) == 2
    assert run_command(["preferences", str(clips), *out]) == 0
    assert run_command(["preferences", str(clips), *out]) == 2
    assert "nothing is written over" in capfd.readouterr().err
    (clips / "0000-0.gif").unlink()
    assert run_command(["label", str(clips)]) == 2
    assert "is no file of a clip" in capfd.readouterr().err


def test_judgements_of_a_comparison_are_preferences(clips: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": p, "a": f"{i:04d}-0.gif", "b": f"{i:04d}-1.gif"} for i, p in enumerate(PROMPTS)]
    named = {side: {"name": side, "model": side} for side in "ab"}
    (clips / "comparison.json").write_text(json.dumps({"study": "s", **named, "pairs": pairs}))
    answers = [{"pair": 0, "choice": "b", "left": "a"}, {"pair": 1, "choice": "tie", "left": "a"}]
    (tmp_path / "ann.json").write_text(json.dumps({"study": "s", "judge": "Ann", "judgements": answers}))
    out = tmp_path / "p.jsonl"
    assert run_command(["preferences", str(clips), str(tmp_path / "ann.json"), "-o", str(out)]) == 0
    table = read_preferences(out, "preferences.train")
    assert [table.files[i].name for i in table.pairs[0]] == ["0000-1.gif", "0000-0.gif"]
    assert len(table.ties) == 1
