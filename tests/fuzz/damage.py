"""Damage to folders of models, as examples of hypothesis: files cut, removed, swapped or renamed, JSON flipped."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

# Examples of all tests of models together; `make test-all` takes many more.
EXAMPLES = int(os.environ.get("EUPHONIUM_FUZZ_EXAMPLES", "300"))
SEED = int(os.environ.get("EUPHONIUM_FUZZ_SEED", "0"))

KINDS = ("cut", "remove", "swap", "rename", "flip", "empty", "remove folder", "folder for file", "garbage")

Test = TypeVar("Test", bound=Callable[..., None])


@dataclass(frozen=True)
class Damage:
    """One change of a folder; which file it hits depends on those that there are.

    Attributes:
        kind: what happens.
        file: which file, as a share of all.
        other: the other file of a swap, likewise.
        place: where in the file, as a share of its length.
        bits: what is done to the byte there.
    """

    kind: str
    file: float
    other: float
    place: float
    bits: int

    def apply(self, folder: Path) -> str:
        """Damages the folder; returns the first part of the damaged file's path."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            return ""
        if self.kind == "flip":
            files = [path for path in files if path.suffix == ".json"] or files
        path = _pick(files, self.file)
        getattr(self, "_" + self.kind.replace(" ", "_"))(path, folder, files)
        return path.relative_to(folder).parts[0]

    def _cut(self, path: Path, *_: object) -> None:
        held = path.read_bytes()
        path.write_bytes(held[: int(self.place * len(held))])

    def _remove(self, path: Path, *_: object) -> None:
        path.unlink()

    def _swap(self, path: Path, _: Path, files: list[Path]) -> None:
        other = _pick(files, self.other)
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)

    def _rename(self, path: Path, *_: object) -> None:
        path.rename(path.with_name("renamed-" + path.name))

    def _flip(self, path: Path, *_: object) -> None:
        held = bytearray(path.read_bytes())
        if held:
            held[int(self.place * (len(held) - 1))] ^= self.bits
        path.write_bytes(held)

    def _empty(self, path: Path, *_: object) -> None:
        path.write_bytes(b"{}" if path.suffix == ".json" and self.bits % 2 else b"")

    def _remove_folder(self, path: Path, folder: Path, _: list[Path]) -> None:
        shutil.rmtree(path.parent if path.parent != folder else path, ignore_errors=True)

    def _folder_for_file(self, path: Path, *_: object) -> None:
        path.unlink()
        path.mkdir()

    def _garbage(self, path: Path, *_: object) -> None:
        held = path.read_bytes()
        at = int(self.place * len(held))
        path.write_bytes(held[:at] + bytes([self.bits, 0xFF, 0x00, 0xC3]) * 5 + held[at:])


share = st.floats(0, 1, exclude_max=True)
one_damage = st.builds(Damage, st.sampled_from(KINDS), share, share, share, st.integers(1, 255))
damages = st.lists(one_damage, min_size=1, max_size=3)


def fuzzed(part: float) -> Callable[[Test], Test]:
    """Settings of a test that takes a part of all examples."""
    examples = max(20, round(part * EXAMPLES))

    def decorate(test: Test) -> Test:
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
        configured = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks)
        return seed(SEED)(configured(test))

    return decorate


@contextmanager
def damaged(source: Path, scratch: Path, changes: list[Damage]) -> Iterator[tuple[Path, set[str]]]:
    """A damaged copy of a folder, and the parts that were hit; nothing in or beside it may change meanwhile."""
    shutil.rmtree(scratch, ignore_errors=True)
    copy = scratch / "model"
    shutil.copytree(source, copy)
    hit = {change.apply(copy) for change in changes}
    before = snapshot(scratch)
    yield copy, hit
    assert snapshot(scratch) == before


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def _pick(files: list[Path], place: float) -> Path:
    return files[int(place * len(files))]
