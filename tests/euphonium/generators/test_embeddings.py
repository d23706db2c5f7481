"""What a run demands of its encoded prompts before it starts."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.embeddings import check_embeddings, encoder_fingerprint, stored_encoder
from euphonium.generators.prompt_store import INDEX
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.cases import NEGATIVE_PROMPT, PROMPTS, family_of
from tests.euphonium.generators.stores import store_of
from tests.euphonium.generators.tiny_pipelines import Folders


def copied(folders: Folders, target: Path) -> ModelConfig:
    """A generator of its own to spoil."""
    family = family_of("wan", folders)
    shutil.copytree(family.folder, target)
    return family.config.model_copy(update={"path": str(target)})


def test_a_store_with_all_prompts_of_the_same_encoders_is_taken(folders: Folders, tmp_path: Path) -> None:
    family = family_of("wan", folders)
    store = store_of(tmp_path / "store", family.config, [*PROMPTS, NEGATIVE_PROMPT])
    assert check_embeddings(store, family, PROMPTS) == f"none: 3 prompts are read from {store}"
    # What encoding does not depend on may differ.
    other = open_generator(family.config.model_copy(update={"height": 32, "cfg_scale": None, "frames": 1}))
    assert check_embeddings(store, other, PROMPTS).startswith("none: 2 prompts")
    assert stored_encoder(None, family) is None


def test_lacking_prompts_are_named_with_the_command_that_adds_them(folders: Folders, tmp_path: Path) -> None:
    family = family_of("wan", folders)
    store = store_of(tmp_path / "a store", family.config, PROMPTS[:1])
    with pytest.raises(ConfigError) as refused:
        check_embeddings(store, family, [*PROMPTS, "x", "y", "z"], files=[tmp_path / "my prompts.txt"])
    message = str(refused.value)
    assert message.startswith(f"prompts.embeddings: {store} lacks 5 of 6 prompts: 'a sign \"no\"', 'x', 'y', ...; add ")
    words = shlex.split(message.partition("what is lacking: ")[2])
    assert words == [
        "euphonium", "preprocess", str(tmp_path / "my prompts.txt"), "--model", family.config.path,
        "--dtype", "float32", "--max-prompt-tokens", "24", "--negative-prompt", NEGATIVE_PROMPT, "--output", str(store),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 prompts: 'blurry'; add"):
        check_embeddings(store, family, PROMPTS[:1])


def test_prompts_that_were_encoded_otherwise_are_refused(folders: Folders, tmp_path: Path) -> None:
    model = copied(folders, tmp_path / "model")
    store = store_of(tmp_path / "store", model, [*PROMPTS, NEGATIVE_PROMPT])

    def refused(why: str, **changes: object) -> None:
        family = open_generator(model.model_copy(update=changes))
        with pytest.raises(
            ConfigError, match=rf"^prompts\.embeddings: \S+store holds .* \({why}\); give another folder"
        ):
            check_embeddings(store, family, PROMPTS)

    refused("max_prompt_tokens 24 instead of 16", max_prompt_tokens=16)
    refused("dtype float32 instead of bfloat16", dtype="bfloat16")
    before = encoder_fingerprint(open_generator(model))
    tokenizer = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"extra": 1}))
    refused(r"tokenizer \w+ instead of \w+")
    weights = tmp_path / "model" / "text_encoder" / "model.safetensors"
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.write_bytes(spoiled)
    refused(r"text_encoder \w+ instead of \w+, tokenizer \w+ instead of \w+")
    after = encoder_fingerprint(open_generator(model))
    assert {name for name in before if before[name] != after[name]} == {"text_encoder", "tokenizer"}
    shutil.rmtree(weights.parent)
    with pytest.raises(ConfigError, match=r"the component text_encoder of \S+ cannot be read .*; download or copy"):
        check_embeddings(store, open_generator(model), PROMPTS)
    # Of a model that is not here only the settings are compared.
    said = check_embeddings(store, open_generator(model), PROMPTS, weights=False)
    assert said.endswith("; that they are of this model's encoders is checked when it is here")
    with pytest.raises(ConfigError, match="max_prompt_tokens 24 instead of 9"):
        check_embeddings(
            store, open_generator(model.model_copy(update={"max_prompt_tokens": 9})), PROMPTS, weights=False
        )


def test_what_is_no_store_is_named(folders: Folders, tmp_path: Path) -> None:
    family = family_of("wan", folders)
    (tmp_path / "notes.txt").write_text("")
    for path, message in {
        "none": r"^f: there is no \S+none; write it with euphonium preprocess, or leave the field out",
        "": rf"^f: \S+ holds no {INDEX}",
        "notes.txt": r"^f: \S+notes\.txt is neither a store of euphonium preprocess nor a videos2caption\.json; give",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_embeddings(tmp_path / path, family, PROMPTS, field="f")
