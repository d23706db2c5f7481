"""Files that are not there: what was probably meant, or what else is."""

import os
from pathlib import Path

import pytest

from euphonium.errors import ConfigError
from euphonium.text_files import LISTED, read_text


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        read_text(path, "prompts.train")
    return str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wan-2.1").mkdir()
    for name in ("dancegrpo.yaml", "flow-grpo.yaml", "prompts.txt"):
        (tmp_path / "wan-2.1" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("wan-2.1/flow-grop.yaml", "did you mean {}/wan-2.1/flow-grpo.yaml?"),
        ("wan-2.1/dancegrpo.yml", "did you mean {}/wan-2.1/dancegrpo.yaml?"),
        ("wan2.1/flow-grpo.yaml", "did you mean {}/wan-2.1?"),
        ("wan-2.1/euphonium.yaml", "{}/wan-2.1 has dancegrpo.yaml, flow-grpo.yaml"),
        ("wan-2.1/captions.jsonl", "give a file that is here and may be read"),
        ("elsewhere/captions.jsonl", "give a file that is here and may be read"),
    ],
)
def test_the_remedy_names_what_is_there(folder: Path, given: str, remedy: str) -> None:
    named = folder / given
    expected = f"prompts.train: cannot read {named}: No such file or directory; {remedy.format(folder)}"
    assert refusal(named) == expected


def test_paths_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert refusal(Path("wan_2.1")).endswith("did you mean wan-2.1?")


def test_a_link_that_leads_nowhere_is_not_what_was_meant(folder: Path) -> None:
    link = folder / "captions.txt"
    link.symlink_to(folder / "gone.txt")
    assert refusal(link).endswith("give a file that is here and may be read")


def test_of_many_files_none_is_named(folder: Path) -> None:
    for number in range(LISTED):
        (folder / "wan-2.1" / f"{number}.txt").touch()
    assert refusal(folder / "wan-2.1" / "captions.txt").endswith("give a file that is here and may be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_may_not_be_looked_into_is_no_other_error(folder: Path) -> None:
    (folder / "wan-2.1").chmod(0o300)
    assert refusal(folder / "wan-2.1" / "captions.txt").endswith("give a file that is here and may be read")
