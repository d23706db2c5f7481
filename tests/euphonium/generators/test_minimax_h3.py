"""MiniMax-H3: one state of video and sound, which walk levels of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import MiniMaxH3Scheduler

from euphonium.dynamics import StepTable, noised, shifted_sigmas
from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.minimax_h3 import MiniMaxH3
from euphonium.generators.registry import open_generator
from tests.euphonium.generators.cases import CASES, CPU, conditioning_of, family_of, noise
from tests.euphonium.generators.tiny_minimax_h3 import SHIFTS
from tests.euphonium.generators.tiny_pipelines import Folders

RATIO = SHIFTS[1] / SHIFTS[0]


@pytest.fixture
def family(folders: Folders) -> MiniMaxH3:
    return cast(MiniMaxH3, family_of("minimax h3", folders))


@pytest.mark.parametrize("index", range(1, 6))
def test_a_state_at_the_videos_level_is_the_sound_at_its_own(family: MiniMaxH3, index: int) -> None:
    """The forward process of the state is that of the sound, so that likelihoods and objectives need nothing else."""
    sigma, own = (shifted_sigmas(6, shift)[index].float() for shift in SHIFTS)
    video, data = (torch.zeros_like(part) for part in family.layout.tokens_of(noise(family)))
    data = data + torch.linspace(-2, 2, data.shape[1])[None, :, None]
    eps = noise(family)
    state = noised(family.states(video, data / RATIO), eps, sigma.expand(2))
    sound = family.layout.tokens_of(state)[1] / (sigma / own)
    torch.testing.assert_close(sound, noised(data, family.layout.tokens_of(eps)[1], own.expand(2)))


@pytest.mark.parametrize("index", range(6))
def test_a_step_of_the_state_is_that_of_the_sounds_own_scheduler(index: int) -> None:
    levels, own = (shifted_sigmas(6, shift) for shift in SHIFTS)
    data, eps = torch.tensor([[1.5, -0.5]]), torch.tensor([[0.3, 0.9]])
    table = StepTable.build("ode", levels)
    state = noised(data / RATIO, eps, levels[index].float().expand(1))
    ours = table.coef_x[index] * state + table.coef_v[index] * (eps - data / RATIO)
    scheduler = MiniMaxH3Scheduler(shift=SHIFTS[1])
    scheduler.set_timesteps(7)
    x = noised(data, eps, own[index].float().expand(1))
    theirs = scheduler.step(data - eps, scheduler.timesteps[index], x, return_dict=False)[0]
    # What the state holds of a sound: at the end only the scale is left.
    scale = levels[index + 1] / own[index + 1] if index < 5 else 1 / RATIO
    torch.testing.assert_close(ours.float(), theirs * float(scale))


def test_samples_of_a_batch_know_nothing_of_each_other(family: MiniMaxH3) -> None:
    """Though their prompts have different lengths and their levels differ, and they are in one sequence."""
    transformer, x, time = family.load_transformer(CPU), noise(family), torch.tensor([0.3, 0.95])
    conditioning = conditioning_of(family)
    assert len(set(conditioning["encoder_attention_mask"].sum(dim=1).tolist())) == 2
    calls: list[int] = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        together = family.velocity(transformer, x, time, conditioning)
        assert len(calls) == 1, "ranks of ZeRO-3 call it equally often, whatever their batches are"
        for i in range(2):
            alone: Conditioning = {name: entry[i : i + 1] for name, entry in conditioning.items()}
            one = family.velocity(transformer, x[i : i + 1], time[i : i + 1], alone)
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-4)


def test_video_and_sound_hear_of_each_other(family: MiniMaxH3) -> None:
    transformer, x, time = family.load_transformer(CPU), noise(family, 1), torch.tensor([0.5])
    conditioning = conditioning_of(family, ["a red car"])
    _, videos, _ = family.layout.places
    with torch.no_grad():
        before = family.velocity(transformer, x, time, conditioning)
        for part in (slice(None, videos), slice(videos, None)):
            other = x.clone()
            other[..., part] += 1
            moved = (family.velocity(transformer, other, time, conditioning) - before).abs()
            assert float(moved[..., :videos].max()) > 1e-4
            assert float(moved[..., videos:].max()) > 1e-4


def test_files_of_videos_alone_are_refused(family: MiniMaxH3) -> None:
    with pytest.raises(ConfigError, match="no latents of the sound"):
        family.load_vae(CPU, torch.float32).encode(torch.zeros(1, 22, 3, 16, 24))


def test_a_text_encoder_that_is_cut_where_it_is_read_is_refused(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders("MiniMaxH3ModularPipeline"), copy)
    file = copy / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["num_hidden_layers"] = 50
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"layer 50 of the text encoder .* has 50; download or copy it again"):
        open_generator(CASES["minimax h3"].config(copy))


def test_components_of_other_tasks_may_be_missing(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders("MiniMaxH3ModularPipeline"), copy)
    file = copy / "modular_model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"transformer_ref": index["transformer"]}))
    shutil.rmtree(copy / "processor")
    check_generator(open_generator(CASES["minimax h3"].config(copy)))
    # A root that names the class alone, as the published one beside the model's own code.
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "MiniMaxH3ModularPipeline"}))
    check_generator(open_generator(CASES["minimax h3"].config(copy)))
    shutil.rmtree(copy / "audio_vae")
    with pytest.raises(ConfigError, match=r"component audio_vae of .*: modular_model_index\.json names it, but its"):
        check_generator(open_generator(CASES["minimax h3"].config(copy)))


def test_recomputed_blocks_find_the_packing_of_their_own_pass(family: MiniMaxH3) -> None:
    x, time, conditioning = noise(family), torch.tensor([0.3, 0.95]), conditioning_of(family)
    found = []
    for recomputing in (False, True):
        transformer = family.build_transformer().train()
        transformer.load_state_dict(family.load_transformer(CPU).state_dict())
        if recomputing:
            transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        family.velocity(transformer, x, time, conditioning).square().sum().backward()
        found.append({name: p.grad for name, p in transformer.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
