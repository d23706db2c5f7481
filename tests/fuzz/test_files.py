"""Prompt and preference files of any bytes: read, or refused with file and line."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from euphonium.config import PreferencesConfig
from euphonium.prompt_files import prompt_images, read_prompt_file
from learners.rewards.preference_files import open_preferences
from tests.fuzz.harness import fuzz, taken_or_refused
from tests.fuzz.values import TEXT, VALUES

NAMES = st.sampled_from(
    ["a.png", "b.mp4", "c.npy", "none.png", "", ".", "..", "a\0", "x" * 300, "~/a", "/dev/null", "\ud800"]
)
ENDINGS = st.sampled_from([".txt", ".jsonl", ".JSONL", ".json", ".csv", ""])
ODD = st.sampled_from(
    ["\n", "\r\n", "\r", "\u2028", "\x0c", "\x85", "\x1e", "\ufeff", "# ", "{", "}", '"prompt"', ": ", '"',
     "NaN", "[", "9" * 5000,
     "\\ud800", "\x00", '{"prompt": "a"}', "[" * 2000]
)  # fmt: skip
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(ODD, TEXT), max_size=20).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass")),
    st.text(max_size=50).flatmap(
        lambda text: st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"]).map(
            lambda coding: text.encode(coding, "replace")
        )
    ),
)


def lines(keys: list[str]) -> st.SearchStrategy[bytes]:
    """JSON lines with these keys, and with values of all kinds under them."""
    value = st.one_of(TEXT, NAMES, VALUES, st.sampled_from([0, 1, True, False, "a red car", "a blue car"]))
    row = st.dictionaries(st.one_of(st.sampled_from(keys), st.sampled_from(keys), TEXT), value, max_size=5)
    text = row.map(lambda row: json.dumps(row, default=str))
    ends = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])
    return st.lists(st.tuples(text, ends).map("".join), max_size=6).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
    )


def listed(keys: list[str]) -> st.SearchStrategy[bytes]:
    """The same as one list."""
    return lines(keys).map(lambda data: b"[" + b",".join(line for line in data.split(b"\n") if line.strip()) + b"]")


def folder_with(tmp_path: Path, name: str, data: bytes) -> Path:
    for file in tmp_path.iterdir():
        file.unlink()
    for sample in ("a.png", "b.mp4", "c.npy"):
        (tmp_path / sample).write_bytes(b"")
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@fuzz()
@given(data=BYTES | lines(["prompt", "image"]) | listed(["caption", "cap", "prompt", "image"]), ending=ENDINGS)
def test_prompt_files(data: bytes, ending: str, tmp_path: Path) -> None:
    file = folder_with(tmp_path, f"prompts{ending}", data)
    prompts = taken_or_refused(lambda: read_prompt_file(file, "prompts.train"), [str(file)], tmp_path)
    if prompts is not None:
        assert prompts
        for prompt in prompts:
            assert prompt.text.strip() == prompt.text != ""
            prompt.text.encode()
            assert not set("\r\n") & set(prompt.text) or ending.lower() != ".txt"
        taken_or_refused(lambda: prompt_images([file]), [str(file)], tmp_path)


@fuzz()
@given(data=BYTES | lines(["prompt", "winner", "loser", "tie", "sample", "label", "image"]), ending=ENDINGS)
def test_preference_files(data: bytes, ending: str, tmp_path: Path) -> None:
    file = folder_with(tmp_path, f"preferences{ending}", data)
    settings = PreferencesConfig(train=file, held_out_fraction=0.5)
    tables: Any = taken_or_refused(lambda: open_preferences(settings, 0), [str(file)], tmp_path)
    if tables is not None:
        assert not set(tables[0].prompts) & set(tables[1].prompts)


@fuzz(0.2)
@given(name=NAMES | TEXT.filter(lambda text: "/" not in text))
def test_paths(name: str, tmp_path: Path) -> None:
    taken_or_refused(lambda: read_prompt_file(tmp_path / name, "prompts.train"), ["prompts.train: "], tmp_path)
