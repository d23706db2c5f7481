"""Preference files, and videos on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from euphonium.config import PreferencesConfig
from euphonium.errors import ConfigError
from learners.rewards.preference_files import open_preferences, read_preferences
from learners.rewards.video_files import read_frames


def write(folder: Path, *rows: Any, name: str = "p.jsonl") -> Path:
    for file in "abcdef":
        (folder / f"{file}.npy").touch()
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def pair(prompt: str, winner: str, loser: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "winner": f"{winner}.npy", "loser": f"{loser}.npy", **more}


def label(prompt: str, sample: str, value: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sample": f"{sample}.npy", "label": value}


def test_pairs_ties_and_labels_in_one_file(tmp_path: Path) -> None:
    path = write(
        tmp_path, pair("x", "a", "b"), "", pair("x", "a", "c", tie=True),
        label("y", "a", 1), label("y", "d", 1), label("y", "e", 0), label("z", "f", 1),
    )  # fmt: skip
    table = read_preferences(path, "preferences.train")
    named = [(table.prompts[table.prompt[a]], table.files[a].stem, table.files[b].stem) for a, b in table.pairs]
    # Positives against negatives of their own prompt; z has no negative, and y's a is not x's a.
    assert sorted(named) == [("x", "a", "b"), ("y", "a", "e"), ("y", "d", "e")]
    assert [(table.files[a].stem, table.files[b].stem) for a, b in table.ties] == [("a", "c")]
    assert sorted(table.label.tolist()) == [-1, -1, -1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "a line should be an object"),
        ({"prompt": "x", "winner": "a.npy"}, "field 'loser' is missing"),
        ({"winner": "a.npy", "loser": "b.npy"}, "field 'prompt' is missing"),
        (pair("x", "a", "nowhere"), "field 'loser': there is no file"),
        (pair(" ", "a", "b"), "field 'prompt' must be a text"),
        (pair("x", "a", "a"), "name the same file"),
        (pair("x", "a", "b", tie="no"), "field 'tie' must be true or false"),
        (pair("x", "a", "b", score=1), "unknown field 'score'; known here: image, loser, prompt, tie, winner"),
        (label("x", "a", 2), "field 'label' must be 0 or 1, got 2"),
        (label("x", "a", None), "field 'label' must be 0 or 1"),
        (label("first", "a", 0), "field 'label': the sample already has the label 1"),
        (pair("x", "a", "b", image="nowhere.png"), "field 'image': there is no file"),
        (pair("x", "a", "b", image=3), "field 'image' must be a text"),
        (label("first", "a", 1) | {"image": "b.npy"}, "field 'image': the prompt 'first' already has the image"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, label("first", "a", 1) | {"image": "a.npy"}, row)
    with pytest.raises(ConfigError) as error:
        read_preferences(path, "preferences.train")
    assert f"{path}:2: " in str(error.value)
    assert message in str(error.value)


def test_a_prompt_is_known_by_its_text_without_the_spaces_around_it(tmp_path: Path) -> None:
    table = read_preferences(write(tmp_path, pair(" x ", "a", "b"), pair("x", "c", "d")), "preferences.train")
    assert table.prompts == ["x"]
    assert len(table.pairs) == 2


def test_pictures_go_with_their_prompts(tmp_path: Path) -> None:
    # In one line of a prompt, or in all; files stand for pictures here.
    rows = [pair("x", "a", "b", image="c.npy"), pair("x", "a", "d"), pair("y", "a", "b", image="d.npy")]
    path = write(tmp_path, *rows, rows[0], pair("z", "a", "b"))
    assert read_preferences(path, "f").images == {"x": tmp_path / "c.npy", "y": tmp_path / "d.npy"}
    parts = open_preferences(PreferencesConfig(train=path, held_out_fraction=0.34), seed=0)
    assert sorted(text for part in parts for text in part.images) == ["x", "y"]
    assert all(set(part.images) <= set(part.prompts) for part in parts)


def test_held_out_prompts_are_strictly_held_out(tmp_path: Path) -> None:
    rows = [pair(f"prompt {i}", "a", "b") for i in range(10)]
    path = write(tmp_path, *rows)
    train, held_out = open_preferences(PreferencesConfig(train=path, held_out_fraction=0.3), seed=0)
    assert (len(train.prompts), len(held_out.prompts)) == (7, 3)
    assert set(train.prompts) | set(held_out.prompts) == {f"prompt {i}" for i in range(10)}
    assert (len(train.pairs), len(held_out.pairs)) == (7, 3)
    # Numbers were renewed: every pair is of its own prompt.
    assert (train.prompt[train.pairs[:, 0]] == train.prompt[train.pairs[:, 1]]).all()
    assert len(train.files) == 14
    other = write(tmp_path, pair("prompt 3", "c", "d"), name="q.jsonl")
    with pytest.raises(ConfigError, match=r"preferences.held_out: 1 prompts are also in .*'prompt 3'"):
        open_preferences(PreferencesConfig(train=path, held_out=other), seed=0)
    alone = write(tmp_path, pair("x", "a", "b"), name="r.jsonl")
    with pytest.raises(ConfigError, match="too few to hold 1 out"):
        open_preferences(PreferencesConfig(train=alone), seed=0)
    with pytest.raises(ConfigError, match=r"preferences.train: cannot read .*nowhere"):
        open_preferences(PreferencesConfig(train=tmp_path / "nowhere"), seed=0)
    with pytest.raises(ConfigError, match="holds no preference"):
        read_preferences(write(tmp_path, "", name="s.jsonl"), "preferences.train")


def test_frames_come_from_gifs_arrays_and_videos(tmp_path: Path) -> None:
    levels = np.linspace(0, 250, 5).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (5, 16, 32, 3)).copy()
    np.save(tmp_path / "a.npy", frames)
    assert (read_frames(tmp_path / "a.npy") == frames).all()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    assert abs(read_frames(tmp_path / "a.gif").astype(int) - frames).max() <= 2
    images[2].save(tmp_path / "a.png")
    assert read_frames(tmp_path / "a.png").shape == (1, 16, 32, 3)
    np.save(tmp_path / "b.npy", np.zeros((5, 4, 4)))
    with pytest.raises(ConfigError, match="frames are uint8"):
        read_frames(tmp_path / "b.npy")
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"c.mp4: .*(decoded|PyAV)"):
        read_frames(tmp_path / "c.mp4")
    with pytest.raises(ConfigError, match="no kind of video"):
        read_frames(tmp_path / "c.txt")


def test_frames_come_from_mp4(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    levels = np.array([20, 90, 160, 230], dtype=np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in levels:
            picture = np.full((16, 32, 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "a.mp4")
    assert frames.shape == (4, 16, 32, 3)
    assert abs(frames.mean(axis=(1, 2, 3)) - levels).max() < 6
