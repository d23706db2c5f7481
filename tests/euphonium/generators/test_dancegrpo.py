"""Embeddings in the layout of DanceGRPO's preprocessing, made with the encoders of the tiny pipelines.

The layout is that of its scripts ``preprocess_hunyuan_embeddings.py``, ``preprocess_flux_embedding.py`` and
``preprocess_wan_2_1_embeddings.py``: a file for each prompt without the batch, HunyuanVideo's with the pooled embedding
padded and in front, masks of 256 truth values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from actors.rollout import encode_one
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.dancegrpo import LIST
from euphonium.generators.embeddings import check_embeddings, stored_encoder
from euphonium.generators.generator import Generator
from tests.euphonium.generators.cases import CPU, LIMIT, PROMPTS, family_of, pictures
from tests.euphonium.generators.tiny_pipelines import Folders


def hunyuan_parts(encoded: Conditioning) -> dict[str, Tensor]:
    hidden, mask = encoded["encoder_hidden_states"][0], encoded["encoder_attention_mask"][0]
    pooled = functional.pad(
        encoded["pooled_projections"], (0, hidden.shape[1] - encoded["pooled_projections"].shape[1])
    )
    rest = torch.full((LIMIT - len(hidden), hidden.shape[1]), 7.0)
    return {
        "prompt_embed_path": torch.cat([pooled, hidden, rest]),
        "prompt_attention_mask": functional.pad(mask.bool(), (0, len(rest))),
    }


def flux_parts(encoded: Conditioning) -> dict[str, Tensor]:
    return {
        "prompt_embed_path": encoded["encoder_hidden_states"][0],
        "pooled_prompt_embeds_path": encoded["pooled_projections"][0],
        "text_ids": torch.zeros(LIMIT, 3),
    }


def wan_parts(encoded: Conditioning) -> dict[str, Tensor]:
    return {
        "prompt_embed_path": encoded["encoder_hidden_states"][0],
        "negative_prompt_embeds_path": encoded["negative.encoder_hidden_states"][0],
    }


PARTS: dict[str, Callable[[Conditioning], dict[str, Tensor]]] = {
    "hunyuan": hunyuan_parts, "skyreels": hunyuan_parts, "flux": flux_parts, "wan": wan_parts,
}  # fmt: skip
FOLDERS = {
    "prompt_embed_path": "prompt_embed", "prompt_attention_mask": "prompt_attention_mask", "text_ids": "text_ids",
    "pooled_prompt_embeds_path": "pooled_prompt_embeds", "negative_prompt_embeds_path": "negative_prompt_embeds",
}  # fmt: skip


def open_case(name: str, folders: Folders) -> Generator:
    # Its preprocessing encodes no negative prompt but the empty one, for Wan.
    changes = {"negative_prompt": ""} if name == "wan" else {"cfg_scale": None, "negative_prompt": ""}
    return family_of(name, folders, **changes)


def released(name: str, family: Generator, folder: Path) -> Path:
    """Writes what the preprocessing leaves behind; returns its list."""
    encode = family.prompt_encoder(CPU, pictures(family) if family.takes_image else None)
    entries = []
    for number, prompt in enumerate(PROMPTS):
        entry = {"caption": prompt}
        for key, tensor in PARTS[name](encode_one(encode, prompt)).items():
            (folder / FOLDERS[key]).mkdir(parents=True, exist_ok=True)
            torch.save(tensor.clone(), folder / FOLDERS[key] / f"{number}.pt")
            entry[key] = f"{number}.pt"
        entries.append(entry)
    (folder / LIST).write_text(json.dumps(entries, indent=4))
    return folder / LIST


@pytest.mark.parametrize("name", PARTS)
def test_released_embeddings_become_the_same_conditioning(name: str, folders: Folders, tmp_path: Path) -> None:
    family = open_case(name, folders)
    path = released(name, family, tmp_path)
    count = 3 if name == "wan" else 2
    assert check_embeddings(path, family, PROMPTS) == f"none: {count} prompts are read from {path}"
    images = pictures(family) if family.takes_image else None
    encode = family.prompt_encoder(CPU, images)
    for place in (path, tmp_path):
        read = family.prompt_encoder(CPU, images, stored_encoder(place, family))
        for prompt in PROMPTS:
            expected, found = encode_one(encode, prompt), encode_one(read, prompt)
            assert found.keys() == expected.keys()
            for entry, tensor in expected.items():
                assert found[entry].dtype == tensor.dtype
                assert torch.equal(found[entry], tensor), entry


def replaced(file: str, value: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / file)


def rewritten(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / LIST).write_text(text)

    return write


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("hunyuan", lambda folder: (folder / "prompt_embed" / "1.pt").unlink(), "1 files that .* names are missing"),
        ("hunyuan", lambda folder: (folder / "prompt_embed" / "0.pt").write_bytes(b"PK"), r"0\.pt cannot be read"),
        ("hunyuan", replaced("prompt_embed/0.pt", {"a": 1}), r"0\.pt holds a dict; it should hold one tensor"),
        ("hunyuan", replaced("prompt_embed/0.pt", Path("a")), r"0\.pt cannot be read"),
        ("hunyuan", replaced("prompt_embed/0.pt", torch.zeros(LIMIT, 64)), "a shape of"),
        ("hunyuan", replaced("prompt_embed/0.pt", torch.zeros(LIMIT + 1, 99)), "a shape of"),
        ("hunyuan", replaced("prompt_embed/0.pt", torch.full((LIMIT + 1, 64), torch.nan)), "it is not finite"),
        ("hunyuan", replaced("prompt_attention_mask/0.pt", torch.arange(LIMIT) > 3), "its mask has a gap"),
        ("flux", replaced("prompt_embed/0.pt", torch.zeros(512, 32)), r"\[512, 32\] instead of \[24, 32\]"),
        ("flux", replaced("pooled_prompt_embeds/0.pt", torch.zeros(8)), r"a shape of \[8\] instead of \[32\]"),
        ("flux", rewritten('[{"caption": "a", "prompt_embed_path": "0.pt"}]'), "has no 'pooled_prompt_embeds_path'"),
        ("flux", rewritten('[{"caption": "a", "prompt_embed_path": "0.pt", "pooled_prompt_embeds_path": "0.pt"}]'),
         r"lacks 2 of 2 prompts: 'a red car', .*; encode all of them into a store with euphonium preprocess"),
        ("flux", rewritten("[]"), "holds no prompt"),
        ("flux", rewritten("{"), "not valid JSON"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_generator_is_named(
    name: str, spoil: Callable[[Path], None], message: str, folders: Folders, tmp_path: Path
) -> None:
    family = open_case(name, folders)
    path = released(name, family, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message) as refused:
        check_embeddings(path, family, PROMPTS)
    assert str(refused.value).startswith("prompts.embeddings: ") or str(path) in str(refused.value)


def test_more_tokens_than_the_recipe_has_are_refused(folders: Folders, tmp_path: Path) -> None:
    family = open_case("hunyuan", folders)
    path = released("hunyuan", family, tmp_path)
    shorter = family_of("hunyuan", folders, max_prompt_tokens=2)
    with pytest.raises(ConfigError, match=r"it has \d tokens, and model\.max_prompt_tokens is 2"):
        check_embeddings(path, shorter, PROMPTS)


def test_generators_without_such_embeddings_and_negative_prompts_are_refused(folders: Folders, tmp_path: Path) -> None:
    family = open_case("wan", folders)
    path = released("wan", family, tmp_path)
    with pytest.raises(
        ConfigError, match=r"is for HunyuanVideoPipeline, .*and model.path is a StableDiffusion3Pipeline"
    ):
        check_embeddings(path, family_of("sd3", folders), PROMPTS)
    with pytest.raises(ConfigError, match="lacks 1 of 3 prompts: 'blurry'; encode all"):
        check_embeddings(path, family_of("wan", folders), PROMPTS)
