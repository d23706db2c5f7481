"""Sounds of samples: those of the pipelines themselves, and as files."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from euphonium.generators.ltx2 import Ltx2
from euphonium.generators.minimax_h3 import MiniMaxH3
from euphonium.generators.sound import Sound
from tests.euphonium.generators.cases import CASES, CPU, PROMPTS, family_of, noise
from tests.euphonium.generators.ltx2_pipeline import ltx2_states
from tests.euphonium.generators.test_families import STEPS, call_of, their_pipeline
from tests.euphonium.generators.tiny_minimax_h3 import minimax_h3_run
from tests.euphonium.generators.tiny_pipelines import Folders


@pytest.mark.parametrize("name", ["ltx2", "ltx2.3"])
def test_the_sound_of_ltx2_is_its_pipelines_own(name: str, folders: Folders) -> None:
    family, case = cast(Ltx2, family_of(name, folders)), CASES[name]
    pipeline = their_pipeline(case, family.folder)
    states = ltx2_states(family, pipeline, pipeline(**call_of(case, family, pipeline)))
    expected = pipeline(**call_of(case, family, pipeline, "pt")).audio
    compare(family, states, expected, pipeline.vocoder.config.output_sampling_rate)


def test_the_sound_of_minimax_h3_is_its_pipelines_own(folders: Folders) -> None:
    family = cast(MiniMaxH3, family_of("minimax h3", folders))
    runs = minimax_h3_run(family, noise(family), PROMPTS, STEPS)
    states = torch.cat([states for states, _ in runs])
    expected = torch.cat([state.get("audio") for _, state in runs])
    compare(family, states, expected, runs[0][1].get("sampling_rate"))


def compare(family: Any, states: Tensor, expected: Tensor, rate: int) -> None:
    decode = family.load_sound_decoder(CPU)
    for i, own in enumerate(expected):
        sound = decode(states[i : i + 1])
        assert sound.rate == rate
        assert sound.samples.shape == own.shape
        torch.testing.assert_close(sound.samples, own, atol=1e-5, rtol=1e-4)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-4, "the two are not the same sound"


@pytest.mark.parametrize("name", ["ltx2", "ltx2.3", "minimax h3"])
def test_a_sound_in_bfloat16_is_that_of_float32_but_for_rounding(name: str, folders: Folders) -> None:
    families = [family_of(name, folders, dtype=dtype) for dtype in ("float32", "bfloat16")]
    states = noise(families[0])[:1]
    exact, rounded = (cast(Any, family.load_sound_decoder(CPU))(states).samples for family in families)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_most_generators_make_no_sound(folders: Folders) -> None:
    assert family_of("wan", folders).load_sound_decoder(CPU) is None


def test_a_sound_is_written_as_it_is(tmp_path: Path) -> None:
    samples = torch.stack([torch.linspace(-1, 1, 100), torch.linspace(1.5, 0, 100)])
    Sound(samples, 16_000).save(tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16_000, 100)
        read = torch.frombuffer(bytearray(file.readframes(100)), dtype=torch.int16).view(100, 2).T / 32767
    torch.testing.assert_close(read, samples.clamp(-1, 1), atol=1 / 32767, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
