"""Prompts that are cut are counted by what their encoder reads."""

from __future__ import annotations

import logging

import pytest
import torch

from euphonium.generators.generator import Generator
from euphonium.generators.prompt_length import warn_of_cut_prompts
from tests.euphonium.generators.cases import CPU, family_of, one_a_family, pictures
from tests.euphonium.generators.tiny_pipelines import Folders

STATES = "encoder_hidden_states"


def tokens_read(family: Generator, prompt: str) -> torch.Tensor:
    """Hidden states of the encoder whose tokens are counted."""
    if family.reads_text_with_image:
        return family.prompt_encoder(CPU, {prompt: next(iter(pictures(family).values()))})([prompt])[STATES]
    hidden = family.load_prompt_encoder(CPU)([prompt])[STATES]
    # Stable Diffusion 3 has those of CLIP in front.
    return hidden[:, -family.config.max_prompt_tokens :] if family.prompt_tokenizer == "tokenizer_3" else hidden


@one_a_family
def test_what_is_behind_the_last_token_changes_nothing(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    # HunyuanVideo's tokenizer knows these words alone, the others spell them out.
    last = ("red", "blue") if name in ("hunyuan", "skyreels") else ("b", "c")
    tokenizer = family.load_tokenizer()
    limit = family.token_limit(tokenizer)
    counts = family.token_counts(tokenizer, ["a " * n + last[0] for n in range(max(60, limit))])
    assert counts == sorted(counts)
    fits = max(n for n, count in enumerate(counts) if count <= limit)
    assert limit - counts[fits] <= 1, "each word is a token or two"

    def differ(words: int) -> bool:
        one, other = (tokens_read(family, "a " * words + word) for word in last)
        return one.shape != other.shape or not torch.equal(one, other)

    assert differ(fits)
    assert not differ(fits + 3)


def test_a_warning_tells_how_many_and_which_is_the_longest(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    family = family_of("flux", folders)
    long = ["x" * 30, "y" * 50, "x" * 30]
    with caplog.at_level(logging.WARNING):
        assert warn_of_cut_prompts(family, ["short", "x" * 22]) == {}
        assert caplog.messages == []
        (said,) = warn_of_cut_prompts(family, ["short", *long]).values()
    assert said.startswith(f"2 of 3 are cut to 24 tokens; the longest has 52: '{'y' * 50}'; shorten them, or raise")
    assert caplog.messages == [f"prompts: {said}"]


def test_without_a_tokenizer_nothing_is_said(folders: Folders) -> None:
    family = family_of("flux", folders)
    family.prompt_tokenizer = "tokenizer_9"  # type: ignore[misc]  # as in a folder of configurations alone
    assert warn_of_cut_prompts(family, ["x" * 99]) == {}
