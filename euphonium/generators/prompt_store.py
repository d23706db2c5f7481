"""The store of encoded prompts that ``euphonium preprocess`` writes: safetensors shards, and an index of the texts.

A shard holds the conditionings of some prompts, each as its encoder gave it alone, and says itself whose they are; its
name follows from its prompts and its encoders. It is written whole or not at all and never changed, so a store can be
read while more prompts are added to it, and what a killed process had finished is found again. The index is made of
what the shards say: it saves readers from opening them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from euphonium.config import Node
from euphonium.errors import ConfigError
from euphonium.files import written_aside
from euphonium.generators.conditioning import Conditioning, stack_conditionings
from euphonium.text_files import parse_json, quoted, read_text, shown

INDEX = "index.json"
SHARDS = "prompts-*.safetensors"
# Version of the format of shards and index.
FORMAT: Literal["1"] = "1"
# Shards that a reader keeps mapped: each takes a file descriptor and its header, the rest stays on disk.
OPEN_SHARDS = 16

# What encoded prompts depend on, by name: settings and hashes of components (embeddings.py).
Fingerprint = Mapping[str, str]


class Shard(Node):
    """A shard as the index lists it."""

    file: Annotated[str, Field(pattern=r"^prompts-[0-9a-f]{16}\.safetensors$")]
    """Its name in the store's folder."""
    nbytes: PositiveInt
    """Its size."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Texts of its conditionings, in order."""


class _Index(Node):
    format: Literal["1"]
    fingerprint: dict[str, str]
    shards: tuple[Shard, ...]


class PromptStore:
    """Reads a store.

    Attributes:
        folder: the store's folder.
        fingerprint: what its encoders were.
        shards: its shards.
    """

    def __init__(self, folder: Path, field: str) -> None:
        """Reads the index.

        Args:
            folder: the store's folder.
            field: what names it, for errors.

        Raises:
            ConfigError: there is no index, or it is damaged.
        """
        index = _read_index(folder, field)
        self.folder = folder
        self.fingerprint: Fingerprint = index.fingerprint
        self.shards = index.shards
        self._field = field
        self._places = {text: (shard, i) for shard in self.shards for i, text in enumerate(shard.prompts)}
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def __contains__(self, text: str) -> bool:
        return text in self._places

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditionings of prompts as one batch, read from disk; a :data:`PromptEncoder`.

        Raises:
            ConfigError: the store lacks a prompt, or its shard is damaged.
        """
        return stack_conditionings([self._read(prompt) for prompt in prompts])

    def check(self) -> None:
        """Checks that all shards are whole, by their headers and sizes.

        Raises:
            ConfigError: some are not; says how many, and what to do.
        """
        damaged = [
            shard.file for shard in self.shards if _described(self.folder / shard.file) != (shard, self.fingerprint)
        ]
        if damaged:
            raise self._damaged(damaged[0], f"{len(damaged)} of {len(self.shards)} shards are")

    def _read(self, prompt: str) -> Conditioning:
        if prompt not in self._places:
            raise ConfigError(
                f"{self._field}: {self.folder} lacks the prompt {quoted(prompt)}; add it with euphonium preprocess"
            )
        shard, number = self._places[prompt]
        stream, names = self._opened(shard)
        prefix = f"{number}/"
        try:
            # Copies: what is mapped would change or vanish with the file.
            return {
                name.removeprefix(prefix): stream.get_tensor(name).clone() for name in names if name.startswith(prefix)
            }
        except SafetensorError as error:
            raise self._damaged(shard.file, "one shard is") from error

    def _open(self, shard: Shard) -> tuple[Any, list[str]]:
        """A mapped shard, and the names of its tensors in the order in which they were encoded."""
        path = self.folder / shard.file
        if _described(path) != (shard, self.fingerprint):
            raise self._damaged(shard.file, "one shard is")
        stream: Any = safe_open(path, framework="pt")
        return stream, json.loads(stream.metadata()["tensors"])

    def _damaged(self, file: str, how_many: str) -> ConfigError:
        return ConfigError(
            f"{self._field}: {self.folder}: {how_many} missing, cut or damaged, for example {file}; write what is lost "
            "anew with euphonium preprocess"
        )


def _read_index(folder: Path, field: str) -> _Index:
    path = folder / INDEX
    if not path.is_file():
        raise ConfigError(
            f"{field}: {folder} holds no {INDEX}, and so no encoded prompts; give the folder that euphonium preprocess "
            "wrote, or let it finish"
        )
    found = parse_json(read_text(path, field), str(path))
    try:
        # Strictly, but for lists in place of tuples: what JSON has.
        return _Index.model_validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ConfigError(
            f"{field}: {path} is no index of encoded prompts ({shown(where)}: {first['msg']}); remove it and run "
            "euphonium preprocess again, which makes it anew of the shards"
        ) from error


# --- writing --------------------------------------------------------------------------------------------------------


def shard_name(fingerprint: Fingerprint, prompts: Sequence[str]) -> str:
    """Name of the shard of some prompts."""
    whole = json.dumps([FORMAT, sorted(fingerprint.items()), list(prompts)])
    return SHARDS.replace("*", hashlib.sha256(whole.encode()).hexdigest()[:16])


def write_shard(
    folder: Path, fingerprint: Fingerprint, prompts: Sequence[str], conditionings: Iterable[Conditioning]
) -> None:
    """Writes the shard of some prompts; it is there whole and on disk, or not at all.

    Args:
        folder: the store's folder, which exists.
        fingerprint: of the encoders.
        prompts: texts.
        conditionings: one a prompt, with a leading dimension of 1.
    """
    tensors = {
        f"{number}/{name}": tensor.detach().cpu().clone().contiguous()
        for number, conditioning in enumerate(conditionings)
        for name, tensor in conditioning.items()
    }
    metadata = {
        "format": FORMAT,
        "fingerprint": json.dumps(dict(fingerprint)),
        "prompts": json.dumps(list(prompts)),
        "tensors": json.dumps(list(tensors)),
    }
    with written_aside(folder / shard_name(fingerprint, prompts)) as aside:
        save_file(tensors, aside, metadata=metadata)
        # Others may read a store that they cannot write; the library keeps its files to their owner.
        aside.chmod(0o644)


def write_index(folder: Path, fingerprint: Fingerprint, shards: Iterable[Shard]) -> None:
    """Writes the index of a store, or replaces it."""
    index = _Index(format=FORMAT, fingerprint=dict(fingerprint), shards=tuple(shards))
    with written_aside(folder / INDEX) as aside:
        aside.write_text(json.dumps(index.model_dump(mode="json"), indent=1, ensure_ascii=False), encoding="utf-8")


def finished_shards(folder: Path, fingerprint: Fingerprint, field: str) -> list[Shard]:
    """The whole shards of a folder, whatever its index says, by name; damaged ones are left out.

    Args:
        folder: the store's folder, which may not exist yet.
        fingerprint: of the encoders that are to add to it.
        field: what names the folder, for errors.

    Raises:
        ConfigError: the folder holds something else, or prompts of other encoders.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{field}: {folder} is a file; give a folder")
    files = sorted(folder.iterdir()) if folder.exists() else []
    strange = [file.name for file in files if not (file.match(SHARDS) or file.name == INDEX or _passing(file))]
    if strange:
        raise ConfigError(
            f"{field}: {folder} holds {quoted(strange[0])}, which is no part of a store; give a folder of its own"
        )
    found = []
    for file in files:
        if file.match(SHARDS) and (described := _described(file)) is not None:
            shard, made_by = described
            refuse_other_encoders(made_by, fingerprint, f"{field}: {folder}")
            found.append(shard)
    return found


def _passing(file: Path) -> bool:
    """Whether it is what a killed writer or the file system may have left."""
    return file.suffix == ".tmp" or file.name.startswith(".")


def refuse_other_encoders(found: Fingerprint, wanted: Fingerprint, where: str) -> None:
    """Checks that prompts were encoded as they are wanted.

    Args:
        found: fingerprint of the prompts.
        wanted: fingerprint of the generator; what it lacks is not compared.
        where: what names the prompts, for errors.

    Raises:
        ConfigError: they were not; names what differs.
    """
    differing = [
        f"{name} {found.get(name, 'none')} instead of {value}"
        for name, value in sorted(wanted.items())
        if found.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"{where} holds prompts that were encoded otherwise ({shown(', '.join(differing), 500)}); give another "
            "folder, or encode them anew with euphonium preprocess --recipe"
        )


def _described(file: Path) -> tuple[Shard, Fingerprint] | None:
    """What a shard says of itself; None for one that is missing, cut or damaged."""
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            names = set(stream.keys())
        prompts, fingerprint = json.loads(metadata["prompts"]), json.loads(metadata["fingerprint"])
        shard = Shard(file=file.name, nbytes=file.stat().st_size, prompts=prompts)
        whole = (
            metadata["format"] == FORMAT
            and names == set(json.loads(metadata["tensors"]))
            and {name.split("/")[0] for name in names} == {str(number) for number in range(len(prompts))}
            and shard_name(fingerprint, prompts) == file.name
        )
        return (shard, fingerprint) if whole else None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        return None
