"""LTX-2: a clip and its sound in one state, drawn by one network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator
from euphonium.generators.embeddings import text_components
from euphonium.generators.ltx2 import Layout, Ltx2
from tests.euphonium.generators.cases import CASES, CPU, conditioning_of, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders


def ltx2(folders: Folders, **changes: object) -> Ltx2:
    family = family_of("ltx2", folders, **changes)
    assert isinstance(family, Ltx2)
    return family


def test_a_state_holds_the_tokens_of_the_clip_and_then_those_of_its_sound(folders: Folders) -> None:
    layout = ltx2(folders).layout
    # 5 frames of 24 a second, and 16,000 / 160 / 4 latents of the sound a second.
    assert layout == Layout((3, 4, 8), 5)
    states = torch.arange(2 * 4 * layout.tokens).view(2, 4, 1, 1, layout.tokens)
    video, sound = layout.split(states)
    assert video[0, 0].flatten().tolist() == list(range(96))
    assert sound[0, 0].tolist() == list(range(96, 101))
    assert torch.equal(layout.join(video, sound), states)


def test_clip_and_sound_depend_on_each_other(folders: Folders) -> None:
    family = ltx2(folders)
    transformer, conditioning, time = family.load_transformer(CPU), conditioning_of(family), torch.full((2,), 0.5)
    x = noise(family)
    video, sound = family.layout.split(x)
    with torch.no_grad():
        whole, other_sound, other_video = (
            family.layout.split(family.velocity(transformer, states, time, conditioning))
            for states in (x, family.layout.join(video, -sound), family.layout.join(-video, sound))
        )
    assert float((whole[0] - other_sound[0]).abs().max()) > 1e-3
    assert float((whole[1] - other_video[1]).abs().max()) > 1e-3


def test_rewards_see_the_clip_alone(folders: Folders) -> None:
    family = ltx2(folders)
    decode, x = family.load_decoder(CPU), noise(family)
    video, sound = family.layout.split(x)
    assert torch.equal(decode(x), decode(family.layout.join(video, -sound)))
    assert not torch.equal(decode(x), decode(family.layout.join(-video, sound)))


def test_what_reads_prompts_and_makes_sound_is_part_of_the_fingerprints(folders: Folders) -> None:
    family = ltx2(folders)
    assert text_components(family) == ["connectors", "text_encoder", "tokenizer"]
    assert set(family.fingerprint()) == {"vae", "audio_vae", "text_encoder", "connectors"}


def test_the_mask_of_a_prompt_hides_nothing(folders: Folders) -> None:
    from diffusers import LTX2Pipeline

    pipeline = LTX2Pipeline.from_pretrained(ltx2(folders).folder)
    hidden, mask, _, _ = pipeline.encode_prompt(
        ["a", "a red car"], do_classifier_free_guidance=False, max_sequence_length=24
    )
    assert not mask.all()
    *_, seen = pipeline.connectors(hidden, mask)
    assert seen.all()


def test_what_rewrites_prompts_is_not_opened(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders(CASES["ltx2"].tiny), tmp_path / "copy")
    file = tmp_path / "copy" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor": ["transformers", "Gemma3Processor"]}))
    family = family_of("ltx2", lambda _: tmp_path / "copy")
    check_generator(family)
    assert set(family.load_prompt_encoder(CPU)(["a red car"])) == {
        "encoder_hidden_states",
        "audio_encoder_hidden_states",
    }


def test_prompts_are_filled_up_in_whole_rounds_of_the_learnt_tokens(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"^model\.max_prompt_tokens: .* 8 learnt tokens, of which 20 is no mult"):
        ltx2(folders, max_prompt_tokens=20)


def test_a_transformer_with_other_channels_for_the_sound_is_refused(folders: Folders, tmp_path: Path) -> None:
    case = CASES["ltx2"]
    shutil.copytree(folders(case.tiny), tmp_path / "copy")
    file = tmp_path / "copy" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"audio_in_channels": 8}))
    with pytest.raises(ConfigError, match=r"^model\.path: .* takes 4 channels of video and 8 of sound"):
        family_of("ltx2", lambda _: tmp_path / "copy")
