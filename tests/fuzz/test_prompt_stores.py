"""Stores of encoded prompts with any damage: read as they were, or refused with a remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from euphonium.generators.prompt_store import INDEX, PromptStore, finished_shards, write_index, write_shard
from tests.fuzz.harness import fuzz, taken_or_refused
from tests.fuzz.values import TEXT, VALUES

MADE_BY = {"pipeline": "P", "dtype": "float32"}
PROMPTS = ("a", "b", "c")
LISTED = st.dictionaries(st.sampled_from(["file", "nbytes", "prompts"]) | TEXT, VALUES, max_size=4)
INDICES = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(
        st.sampled_from(["format", "fingerprint", "shards"]) | TEXT,
        VALUES | st.just("1") | st.lists(LISTED),
        max_size=4,
    ).map(lambda index: json.dumps(index, default=str).encode("utf-8", "surrogatepass")),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        tensors = [{"hidden": torch.full((1, 2, 3), float(ord(prompt)))} for prompt in prompts]
        write_shard(folder, MADE_BY, prompts, tensors)
    write_index(folder, MADE_BY, finished_shards(folder, MADE_BY, "f"))
    return folder


def read(folder: Path) -> list[torch.Tensor]:
    store = PromptStore(folder, "prompts.embeddings")
    store.check()
    return [store.encode([prompt])["hidden"] for prompt in PROMPTS]


def copy(whole: Path, folder: Path) -> Path:
    shutil.rmtree(folder / "store", ignore_errors=True)
    return Path(shutil.copytree(whole, folder / "store"))


@fuzz()
@given(index=INDICES)
def test_indices(index: bytes, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    (folder / INDEX).write_bytes(index)
    taken_or_refused(lambda: read(folder), ["prompts.embeddings", INDEX], folder)


@fuzz()
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), length=st.none() | st.floats(0, 1))
def test_shards(place: float, bits: int, length: float | None, whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    file = max(folder.glob("*.safetensors"))
    held = bytearray(file.read_bytes())
    held[int(place * len(held))] ^= bits
    file.write_bytes(held if length is None else held[: int(length * len(held))])
    tensors = taken_or_refused(lambda: read(folder), ["prompts.embeddings"], folder)
    assert tensors is None or [tensor.shape for tensor in tensors] == [(1, 2, 3)] * 3
    # What is damaged is never taken for finished under another name.
    known: Callable[[], object] = lambda: finished_shards(folder, MADE_BY, "--output")  # noqa: E731
    taken_or_refused(known, ["--output"], folder)
