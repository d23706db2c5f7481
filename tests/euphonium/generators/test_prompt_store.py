"""Prompts from a store are those of the encoders, to the last bit; what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.rollout import encode_one
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import NEGATIVE, Conditioning
from euphonium.generators.embeddings import stored_encoder
from euphonium.generators.prompt_store import INDEX, PromptStore, finished_shards, write_index, write_shard
from tests.euphonium.generators.cases import CASES, CPU, NEGATIVE_PROMPT, PROMPTS, family_of, pictures
from tests.euphonium.generators.stores import store_of
from tests.euphonium.generators.tiny_pipelines import Folders

LISTED = '{"format": "1", "fingerprint": {}, "shards": [{%s}]}'
MADE_BY = {"pipeline": "P", "dtype": "float32"}


def one(value: float, length: int = 2) -> Conditioning:
    return {"hidden": torch.full((1, length, 3), value), "mask": torch.ones(1, length, dtype=torch.int64)}


def small_store(folder: Path) -> Path:
    """A store of three prompts in two shards."""
    folder.mkdir()
    write_shard(folder, MADE_BY, ["a", "b"], [one(1.0), one(2.0)])
    write_shard(folder, MADE_BY, ["c"], [one(3.0, length=0)])
    write_index(folder, MADE_BY, finished_shards(folder, MADE_BY, "--output"))
    return folder


# Qwen-Image-Edit's text encoder reads a prompt with its picture.
ENCODED_ALONE = [name for name in CASES if not name.startswith("qwen edit")]


def same(found: Conditioning, expected: Conditioning) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ENCODED_ALONE),
        *((name, "bfloat16") for name in ENCODED_ALONE if "CFG" not in name),
    ],
)
def test_every_familys_prompts_are_those_of_its_encoders(
    name: str, dtype: str, folders: Folders, tmp_path: Path
) -> None:
    family = family_of(name, folders, dtype=dtype)
    store = store_of(tmp_path / "store", family.config, PROMPTS[:1], [*PROMPTS[1:], NEGATIVE_PROMPT])
    images = pictures(family) if family.takes_image else None
    encode, read = family.prompt_encoder(CPU, images), family.prompt_encoder(CPU, images, stored_encoder(store, family))
    for prompt in PROMPTS:
        expected = encode_one(encode, prompt)
        assert any(entry.startswith(NEGATIVE) for entry in expected) == (family.config.cfg_scale is not None)
        same(encode_one(read, prompt), expected)


def test_a_batch_is_that_of_its_prompts(tmp_path: Path) -> None:
    store = PromptStore(small_store(tmp_path / "store"), "f")
    store.check()
    assert store.encode(["b", "a"])["hidden"][:, 0, 0].tolist() == [2.0, 1.0]
    assert store.encode(["c"])["mask"].shape == (1, 0)
    assert ("a" in store, "d" in store) == (True, False)
    with pytest.raises(ConfigError, match=r"^f: \S+store lacks the prompt 'd'; add it with euphonium preprocess"):
        store.encode(["d"])


def test_what_was_read_is_a_copy(tmp_path: Path) -> None:
    """Files that are replaced under a run must not change, or end, what it holds."""
    store = PromptStore(small_store(tmp_path / "store"), "f")
    held = store.encode(["a"])["hidden"]
    for file in store.folder.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.seek(-24, 2)
            stream.write(b"\xff" * 24)
    assert held.tolist() == [[[1.0] * 3] * 2]


def test_prompts_are_added_while_others_read(tmp_path: Path) -> None:
    folder = small_store(tmp_path / "store")
    reader = PromptStore(folder, "f")
    write_shard(folder, MADE_BY, ["d"], [one(4.0)])
    reader.check()
    assert reader.encode(["c"])["hidden"].shape == (1, 0, 3)
    assert "d" not in reader
    assert {p for shard in finished_shards(folder, MADE_BY, "f") for p in shard.prompts} == {"a", "b", "c", "d"}


def shard(folder: Path, prompt: str) -> Path:
    return next(folder / s.file for s in PromptStore(folder, "f").shards if prompt in s.prompts)


def cut(folder: Path) -> None:
    file = shard(folder, "a")
    file.write_bytes(file.read_bytes()[:-8])


def emptied(folder: Path) -> None:
    shard(folder, "a").write_bytes(b"")


def removed(folder: Path) -> None:
    shard(folder, "a").unlink()


def exchanged(folder: Path) -> None:
    shard(folder, "a").write_bytes(shard(folder, "c").read_bytes())


def longer(folder: Path) -> None:
    file = shard(folder, "a")
    file.write_bytes(file.read_bytes() + b"\0" * 8)


@pytest.mark.parametrize("damage", [cut, emptied, removed, exchanged, longer])
def test_a_damaged_shard_is_refused_and_encoded_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = small_store(tmp_path / "store")
    damage(folder)
    store = PromptStore(folder, "prompts.embeddings")
    with pytest.raises(ConfigError, match=r"^prompts.embeddings: \S+store: 1 of 2 shards are missing, cut or damaged"):
        store.check()
    with pytest.raises(ConfigError, match=r"one shard is missing, cut or damaged.* anew with euphonium preprocess"):
        store.encode(["a"])
    assert store.encode(["c"])["hidden"].shape == (1, 0, 3)
    assert [s.prompts for s in finished_shards(folder, MADE_BY, "f")] == [("c",)]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"^f: \S+store holds no index\.json, and so no encoded prompts; give the folder that euphonium prep"),
        ("", r"index\.json: not valid JSON"),
        ("[]", r"^f: \S+index\.json is no index of encoded prompts \(it: "),
        ('{"format": "1"}', r"\(fingerprint: Field required\); remove it and run euphonium preprocess again"),
        ('{"format": "2", "fingerprint": {}, "shards": []}', r"\(format: Input should be '1'\)"),
        ('{"format": "1", "fingerprint": {"a": 1}, "shards": []}', r"\(fingerprint\.a: "),
        (LISTED % '"file": "../a", "nbytes": 1, "prompts": ["a"]', r"\.file: "),
        (LISTED % '"file": "prompts-0123456789abcdef.safetensors", "nbytes": "1", "prompts": ["a"]', r"\.nbytes: "),
        ("\ufeff" + "[" * 5000, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_named(index: str | None, message: str, tmp_path: Path) -> None:
    folder = small_store(tmp_path / "store")
    (folder / INDEX).unlink()
    if index is not None:
        (folder / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=message) as refused:
        PromptStore(folder, "f")
    assert "\n" not in str(refused.value)
    # The shards say themselves whose they are.
    assert len(finished_shards(folder, MADE_BY, "f")) == 2


def test_a_store_of_other_encoders_is_not_added_to(tmp_path: Path) -> None:
    folder = small_store(tmp_path / "store")
    with pytest.raises(
        ConfigError, match=r"^f: \S+ holds prompts that were encoded otherwise \(dtype float32 instead of"
    ):
        finished_shards(folder, {**MADE_BY, "dtype": "bfloat16"}, "f")


def test_only_a_store_or_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    assert finished_shards(tmp_path / "none", MADE_BY, "f") == finished_shards(tmp_path, MADE_BY, "f") == []
    (tmp_path / "prompts-0123456789abcdef.safetensors.tmp").write_bytes(b"left by a kill")
    assert finished_shards(tmp_path, MADE_BY, "f") == []
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(
        ConfigError, match=r"holds 'thesis\.tex', which is no part of a store; give a folder of its own"
    ):
        finished_shards(tmp_path, MADE_BY, "f")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        finished_shards(tmp_path / "thesis.tex", MADE_BY, "f")


def test_an_index_is_read_by_people_too(tmp_path: Path) -> None:
    index = json.loads((small_store(tmp_path / "store") / INDEX).read_text())
    assert index["fingerprint"] == MADE_BY
    assert sorted(prompt for entry in index["shards"] for prompt in entry["prompts"]) == ["a", "b", "c"]
