"""Prompts that were encoded before a run: finding them, and whether they are those that its generator would make.

They come from a store that ``euphonium preprocess`` wrote (prompt_store.py), or from DanceGRPO's preprocessing
(dancegrpo.py). The text encoders of a generator whose prompts are prepared are never loaded.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from euphonium.errors import ConfigError
from euphonium.files import sha256
from euphonium.generators.conditioning import Conditioning, PromptEncoder
from euphonium.generators.dancegrpo import LIST, ReleasedEmbeddings
from euphonium.generators.generator import Generator
from euphonium.generators.prompt_store import INDEX, Fingerprint, PromptStore, refuse_other_encoders
from euphonium.text_files import quoted, shown

# Texts that an error names of many.
NAMED = 3


class Embeddings(Protocol):
    """Encoded prompts by text."""

    def __contains__(self, text: str) -> bool:
        """Whether they have a prompt."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditionings of prompts as one batch; a :data:`PromptEncoder`."""
        ...

    def check(self) -> None:
        """Checks that what they have can be read; raises ConfigError."""
        ...


def settings_fingerprint(generator: Generator) -> dict[str, str]:
    """What a recipe says that encoded prompts depend on."""
    config = generator.config
    return {
        "pipeline": str(generator.pipeline.index()["_class_name"]),
        "dtype": config.dtype,
        "max_prompt_tokens": str(config.max_prompt_tokens),
    }


def encoder_fingerprint(generator: Generator) -> Fingerprint:
    """What encoded prompts depend on: settings, text encoders (:meth:`PipelineFolder.fingerprint`) and tokenizers.

    Raises:
        ConfigError: a component is missing or cannot be read.
    """
    found = settings_fingerprint(generator)
    for name in text_components(generator):
        try:
            if not name.startswith("tokenizer"):
                found[name] = generator.pipeline.fingerprint(name)
            else:
                files = sorted(file for file in (generator.folder / name).iterdir() if file.is_file())
                whole = "".join(f"{file.name}:{sha256(file)}\n" for file in files)
                found[name] = hashlib.sha256(whole.encode()).hexdigest()[:16]
        except OSError as error:
            raise ConfigError(
                f"model.path: the component {name} of {generator.folder} cannot be read ({error.strerror}); download "
                f"or copy {generator.folder / name} again"
            ) from error
    return found


def text_components(generator: Generator) -> list[str]:
    """Components of a generator's pipeline that read prompts: text encoders and tokenizers, mostly."""
    index, beginnings = generator.pipeline.index(), (*generator.text_networks, "tokenizer")
    return sorted(
        name
        for name, entry in index.items()
        if name.startswith(beginnings) and isinstance(entry, list) and entry != [None, None]
    )


def open_embeddings(path: Path, generator: Generator, field: str) -> Embeddings:
    """Opens encoded prompts.

    Args:
        path: a store, or the ``videos2caption.json`` of DanceGRPO's preprocessing or its folder.
        generator: the generator that they are for.
        field: the recipe's field that names them, for errors.

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    if not path.exists():
        raise ConfigError(f"{field}: there is no {path}; write it with euphonium preprocess, or leave the field out")
    if path.is_dir() and not (path / INDEX).is_file() and (path / LIST).is_file():
        path = path / LIST
    if path.is_file():
        return ReleasedEmbeddings(path, generator, field)
    return PromptStore(path, field)


def stored_encoder(path: Path | None, generator: Generator, field: str = "prompts.embeddings") -> PromptEncoder | None:
    """What reads encoded prompts in place of a generator's text encoders; None without any, for these to be loaded.

    Raises:
        ConfigError: as :func:`open_embeddings`.
    """
    return None if path is None else open_embeddings(path, generator, field).encode


def check_embeddings(
    path: Path,
    generator: Generator,
    prompts: Iterable[str],
    *,
    field: str = "prompts.embeddings",
    files: Sequence[Path] = (),
    weights: bool = True,
) -> str:
    """Checks that a run finds all of its prompts encoded, and as its generator would encode them.

    Args:
        path: as for :func:`open_embeddings`.
        generator: the run's generator.
        prompts: the run's prompts, besides the negative one.
        field: the recipe's field that names the embeddings, for errors.
        files: the prompts' files, for what the error says to do.
        weights: whether the generator's weights are here; else the encoders themselves are not compared.

    Returns:
        What was found, in words.

    Raises:
        ConfigError: prompts are lacking, or were encoded otherwise, or cannot be read; names them and the remedy.
    """
    if generator.reads_text_with_image:
        raise generator.never_encoded_alone(field)
    embeddings = open_embeddings(path, generator, field)
    if isinstance(embeddings, PromptStore):
        wanted = encoder_fingerprint(generator) if weights else settings_fingerprint(generator)
        refuse_other_encoders(embeddings.fingerprint, wanted, f"{field}: {path}")
    texts = dict.fromkeys(map(str, prompts))
    if generator.config.cfg_scale is not None:
        texts[generator.config.negative_prompt] = None
    if missing := [text for text in texts if text not in embeddings]:
        raise ConfigError(_lacking(path, field, missing, len(texts), preprocess_command(path, generator, files)))
    embeddings.check()
    unchecked = "" if weights else "; that they are of this model's encoders is checked when it is here"
    return f"none: {len(texts)} prompts are read from {path}{unchecked}"


def preprocess_command(path: Path, generator: Generator, files: Sequence[Path]) -> str:
    """The command that adds the prompts of some files to a store."""
    config = generator.config
    words = ["euphonium", "preprocess", *(str(file) for file in files or [Path("PROMPTS.txt")])]
    words += ["--model", config.path, *(["--revision", config.revision] if config.revision else [])]
    words += ["--dtype", config.dtype, "--max-prompt-tokens", str(config.max_prompt_tokens)]
    if config.cfg_scale is not None and config.negative_prompt:
        words += ["--negative-prompt", config.negative_prompt]
    return shlex.join([*words, "--output", str(path)])


def _lacking(path: Path, field: str, missing: Sequence[str], count: int, command: str) -> str:
    named = ", ".join(quoted(text) for text in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    if path.suffix.lower() == ".json" or not (path / INDEX).is_file():
        remedy = "encode all of them into a store with euphonium preprocess, and give that"
    else:
        remedy = f"add what is lacking: {shown(command, 1500)}"
    return f"{field}: {path} lacks {len(missing)} of {count} prompts: {named}; {remedy}"
