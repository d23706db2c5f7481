"""Conditionings, put together and taken apart."""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.rollout import encode_one
from euphonium.generators import conditioning as module
from euphonium.generators.conditioning import (
    IMAGE,
    NEGATIVE,
    Conditioning,
    ConditioningCache,
    expand,
    guided,
    negative,
    positive,
    stack_conditionings,
    with_negative_prompt,
    with_pictures,
)
from tests.euphonium.generators.cases import CPU, PROMPTS, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders


def test_encoded_prompts_are_held_within_a_bound_of_bytes() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> Conditioning:
        encoded.append(prompt)
        return {"encoder_hidden_states": torch.full((1, 25), float(len(prompt)))}

    cache = ConditioningCache(encode, max_bytes=200)
    for prompt in ("a", "bb", "a", "ccc", "a", "bb"):
        assert float(cache.of(prompt)["encoder_hidden_states"][0, 0]) == len(prompt)
    # Two of 100 bytes fit; "bb", not used for longest, made room for "ccc".
    assert encoded == ["a", "bb", "ccc", "bb"]
    large = ConditioningCache(encode, max_bytes=1)
    assert large.of("a") is large.of("a")


def test_a_conditioning_of_one_prompt_serves_a_group(folders: Folders) -> None:
    family = family_of("hunyuan 1.5", folders)
    transformer = family.load_transformer(CPU)
    conditioning = encode_one(family.prompt_encoder(CPU), PROMPTS[1])
    assert all(tensor.shape[0] == 1 for tensor in conditioning.values())
    x = noise(family)
    with torch.no_grad():
        group = family.velocity(transformer, x, torch.full((2,), 0.5), expand(conditioning, 2))
        alone = family.velocity(transformer, x[1:], torch.full((1,), 0.5), conditioning)
    torch.testing.assert_close(group[1:], alone, atol=1e-5, rtol=1e-4)


def lengths(prompts: Sequence[str]) -> Conditioning:
    """Prompts as their lengths."""
    return {"hidden": torch.tensor([[float(len(prompt))] for prompt in prompts])}


def pixels(files: Sequence[Path]) -> Conditioning:
    """Pictures as the numbers in their names."""
    return {IMAGE: torch.tensor([[float(file.stem)] for file in files])}


def test_the_negative_prompt_is_encoded_once_and_repeated() -> None:
    seen: list[list[str]] = []

    def encode(prompts: Sequence[str]) -> Conditioning:
        seen.append(list(prompts))
        return lengths(prompts)

    whole = with_negative_prompt(encode, "bad")(["a", "bb"])
    assert seen == [["bad"], ["a", "bb"]]
    assert {name: tensor.tolist() for name, tensor in positive(whole).items()} == {"hidden": [[1.0], [2.0]]}
    assert {name: tensor.tolist() for name, tensor in negative(whole).items()} == {"hidden": [[3.0], [3.0]]}


def test_first_frames_go_to_the_negative_prompt_too_if_there_is_one() -> None:
    images = {"a": Path("7.png"), "bb": Path("9.png")}
    plain = with_pictures(lengths, pixels, images.__getitem__)(["a", "bb"])
    assert plain.keys() == {"hidden", IMAGE}
    assert plain[IMAGE].tolist() == [[7.0], [9.0]]
    encode = with_pictures(with_negative_prompt(lengths, "bad"), pixels, images.__getitem__)
    whole = encode(["bb"])
    assert whole.keys() == {"hidden", IMAGE, NEGATIVE + "hidden", NEGATIVE + IMAGE}
    assert negative(whole)[IMAGE].tolist() == positive(whole)[IMAGE].tolist() == [[9.0]]


@given(scale=st.floats(-10, 10))
def test_guidance_is_the_line_through_both_outputs(scale: float) -> None:
    conditional, unconditional = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 3.0]).double()
    expected = scale * conditional + (1 - scale) * unconditional
    torch.testing.assert_close(guided(conditional, unconditional, scale), expected)


def test_stacking_pads_sequences_and_leaves_the_rest() -> None:
    parts = [
        {"hidden": torch.full((1, length, 2), float(length)), "pooled": torch.ones(1, 3), "scale": torch.tensor([2.0])}
        for length in (1, 3)
    ]
    stacked = stack_conditionings(parts)
    assert {name: tuple(tensor.shape) for name, tensor in stacked.items()} == {
        "hidden": (2, 3, 2), "pooled": (2, 3), "scale": (2,),
    }  # fmt: skip
    assert stacked["hidden"][0, :, 0].tolist() == [1.0, 0.0, 0.0]


def test_what_has_no_mask_is_not_padded() -> None:
    parts = [{"encoder_hidden_states_2": torch.ones(1, length, 2)} for length in (1, 3)]
    with pytest.raises(ValueError, match="'encoder_hidden_states_2', which has no mask"):
        stack_conditionings(parts)
    masked = [part | {"encoder_attention_mask_2": torch.ones(1, 1 + 2 * i)} for i, part in enumerate(parts)]
    assert stack_conditionings(masked)["encoder_attention_mask_2"].tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_the_examples_hold() -> None:
    outcome = doctest.testmod(module)
    assert outcome.failed == 0
    assert outcome.attempted == 6
