from pathlib import Path

import pytest

from euphonium.errors import CheckpointError
from euphonium.files import MANIFEST, commit_folder, sha256, verify_folder, written_aside


def test_a_file_has_its_old_contents_or_all_of_the_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("old")
    with pytest.raises(TypeError), written_aside(file) as aside:
        aside.write_bytes("no bytes")  # type: ignore[arg-type]
    assert file.read_text() == "old"
    with written_aside(file) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def filled(folder: Path, contents: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text(contents)
    return folder


def test_a_committed_folder_replaces_the_one_before_and_knows_its_files(tmp_path: Path) -> None:
    target = tmp_path / "step_1"
    commit_folder(filled(tmp_path / "aside", "first"), target, version=3)
    commit_folder(filled(tmp_path / "aside", "second"), target, version=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert sha256(target / "inner" / "a") in (target / MANIFEST).read_text()
    verify_folder(target, 3)
    with pytest.raises(CheckpointError, match="has checkpoint format 3, this version reads format 4"):
        verify_folder(target, 4)
    (target / "inner" / "a").write_text("secone")
    with pytest.raises(CheckpointError, match="inner/a has other contents"):
        verify_folder(target, 3)
    (target / "inner" / "a").unlink()
    with pytest.raises(CheckpointError, match="inner/a is missing"):
        verify_folder(target, 3)
    with pytest.raises(CheckpointError, match=f"its {MANIFEST} cannot be read"):
        verify_folder(target / "inner", 3)


@pytest.mark.parametrize("manifest", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"format": 3}',
                                      b'{"format": 3, "files": {"inner/a": 1}}'])  # fmt: skip
def test_a_damaged_manifest_is_a_damaged_checkpoint(manifest: bytes, tmp_path: Path) -> None:
    target = tmp_path / "step_1"
    commit_folder(filled(tmp_path / "aside", "first"), target, version=3)
    (target / MANIFEST).write_bytes(manifest)
    with pytest.raises(CheckpointError, match=f"its {MANIFEST} cannot be read"):
        verify_folder(target, 3)
