"""What only Qwen-Image-Edit has: a text encoder that reads prompts with their pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from actors.sampler import sample_deterministic
from euphonium.config import NoiseGridConfig
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import IMAGE, NEGATIVE
from euphonium.generators.embeddings import check_embeddings
from orchestrator.commands.preprocess import open_encoders
from tests.euphonium.generators.cases import CPU, PROMPTS, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders

EDITS = pytest.mark.parametrize("name", ["qwen edit", "qwen edit plus"])
STATES = "encoder_hidden_states"


def drawn(file: Path, colour: str) -> Path:
    """A square of one colour."""
    Image.new("RGB", (40, 40), colour).save(file)
    return file


@EDITS
def test_text_encoder_and_samples_depend_on_the_picture(name: str, folders: Folders, tmp_path: Path) -> None:
    family = family_of(name, folders)
    files = [drawn(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue")]
    red, blue = (family.prompt_encoder(CPU, {PROMPTS[0]: file})(PROMPTS[:1]) for file in files)
    for entry in (STATES, NEGATIVE + STATES, IMAGE):
        assert red[entry].shape == blue[entry].shape
        assert float((red[entry] - blue[entry]).abs().max()) > 1e-3, entry
    transformer = family.load_transformer(CPU)
    samples = []
    # The texts of one, with the latents of one and the other.
    for given in (red, red | {entry: blue[entry] for entry in (IMAGE, NEGATIVE + IMAGE)}):
        with torch.no_grad():
            samples.append(
                sample_deterministic(
                    family.ode_table(2, NoiseGridConfig()),
                    lambda x, time, given=given: family.velocity(transformer, x, torch.full((1,), time), given),
                    noise(family, 1),
                )
            )
    assert float((samples[0] - samples[1]).abs().max()) > 1e-3


@EDITS
def test_a_picture_is_cut_to_the_samples_proportions(name: str, folders: Folders, tmp_path: Path) -> None:
    family = family_of(name, folders)
    whole = family.prompt_encoder(CPU, {PROMPTS[0]: drawn(tmp_path / "whole.png", "green")})(PROMPTS[:1])
    wide = Image.new("RGB", (120, 40), "red")
    # A little more than the square in the middle, because resizing mixes neighbours.
    wide.paste(Image.new("RGB", (60, 40), "green"), (30, 0))
    wide.save(tmp_path / "wide.png")
    cut = family.prompt_encoder(CPU, {PROMPTS[0]: tmp_path / "wide.png"})(PROMPTS[:1])
    for entry in (STATES, IMAGE):
        torch.testing.assert_close(cut[entry], whole[entry])
    assert cut[IMAGE].shape[1:] == family.latent_shape


@EDITS
def test_prompts_that_were_encoded_without_pictures_are_refused(name: str, folders: Folders, tmp_path: Path) -> None:
    family = family_of(name, folders)
    with pytest.raises(ConfigError, match=r"prompts\.embeddings: .* reads every prompt together with its picture"):
        check_embeddings(tmp_path, family, PROMPTS)
    with pytest.raises(ConfigError, match=r"prompts\.embeddings: .* leave prompts\.embeddings out"):
        family.prompt_encoder(CPU, {}, lambda prompts: {})
    with pytest.raises(ConfigError, match=r"--model: .* none is encoded before a run"):
        open_encoders(family.config)


def test_a_prompt_without_a_picture_is_refused(folders: Folders) -> None:
    family = family_of("qwen edit", folders)
    with pytest.raises(ConfigError, match=r"'a red car' has no image, and a QwenImageEditPipeline starts from one"):
        family.prompt_encoder(CPU, {})(PROMPTS[:1])
