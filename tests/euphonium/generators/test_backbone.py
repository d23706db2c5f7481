"""The trained network: as learners build it and rollout actors load it, exported, and cut to a trunk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from euphonium.errors import ConfigError
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel
from tests.euphonium.generators.cases import (
    CASES,
    CPU,
    conditioning_of,
    family_of,
    noise,
    one_a_family,
    one_a_transformer,
)
from tests.euphonium.generators.tiny_pipelines import Folders, open_saved


@one_a_family
def test_an_exported_pipeline_has_the_new_weights_and_all_else(name: str, folders: Folders, tmp_path: Path) -> None:
    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    state = {key: tensor + 0.01 for key, tensor in transformer.state_dict().items()}
    # The name of the path must not matter.
    target = tmp_path / "transformer" / "exported"
    family.export(state, target)
    loaded = open_saved(target)
    assert type(loaded).__name__ == family.pipeline.index()["_class_name"]
    parts = family.trained_components().items()
    got = {prefix + key: t for prefix, part in parts for key, t in getattr(loaded, part).state_dict().items()}
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)
    assert open_generator(family.config.model_copy(update={"path": str(target)})).fingerprint() == family.fingerprint()


@one_a_family
def test_no_buffer_stays_behind_when_a_rank_places_them(name: str, folders: Folders) -> None:
    """With the meta device in the place of the GPU: what is made outside of torch's constructors is on the CPU."""
    from learners.engine.partitioned import place_buffers

    transformer = family_of(name, folders).build_transformer()
    place_buffers(transformer, torch.device("meta"))
    assert all(buffer.is_meta for buffer in transformer.buffers())


@one_a_transformer
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_process_reward_model_grows_on_the_first_blocks(name: str, blocks: int, folders: Folders) -> None:
    family = family_of(name, folders)
    torch.manual_seed(0)
    model = ProcessRewardModel.from_generator(family, blocks)
    generator = load_file(family.transformer_files()[0])
    trunk = model.trunk.state_dict()
    assert all(torch.equal(tensor, generator[key]) for key, tensor in trunk.items())
    assert len(trunk) < len(generator)
    x, time = noise(family), torch.tensor([0.9, 0.3])
    conditioning = conditioning_of(family)
    rewards, gradient = model.reward_and_gradient(x, time, conditioning)
    assert rewards.shape == (2,)
    assert gradient.shape == x.shape
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.flatten(1).norm(dim=1).min()) > 0
    # One sample's reward knows nothing of the others, and everything of its noise level and prompt.
    first = {key: tensor[:1] for key, tensor in conditioning.items()}
    second = {key: tensor[1:] for key, tensor in conditioning.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1], time[:1], first), rewards[:1], atol=1e-5, rtol=1e-4)
        assert float((model(x[:1], time[1:], first) - rewards[:1]).abs()) > 1e-6
        assert float((model(x[:1], time[:1], second) - rewards[:1]).abs()) > 1e-6


@one_a_transformer
def test_a_process_reward_model_is_bound_to_latents_and_texts(name: str, folders: Folders, tmp_path: Path) -> None:
    family = family_of(name, folders)
    model = ProcessRewardModel.from_generator(family, 1)
    model.save(tmp_path / "prm")
    loaded = ProcessRewardModel.load(tmp_path / "prm", family.config)
    x, time, conditioning = noise(family), torch.tensor([0.9, 0.3]), conditioning_of(family)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, time, conditioning), model(x, time, conditioning))
    for part in family.fingerprint():
        other = tmp_path / f"other {part}"
        shutil.copytree(family.folder, other)
        (file,) = (other / part).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        with pytest.raises(ConfigError, match=f"another {part} than"):
            ProcessRewardModel.load(tmp_path / "prm", family.config.model_copy(update={"path": str(other)}))


@one_a_transformer
def test_a_trunk_longer_than_the_transformer_is_refused(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    for blocks in (0, 4):
        with pytest.raises(ConfigError, match=f"trunk of {blocks} blocks"):
            family.build_trunk(blocks)


@one_a_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learner_and_rollout_compute_the_same(name: str, dtype: str, folders: Folders) -> None:
    """A learner builds, fills in the parameters and casts all at once; a rollout actor loads."""
    family = family_of(name, folders, dtype=dtype)
    built = family.build_transformer()
    stored = {prefix + k: t for prefix, file in family.stored_weights() for k, t in load_file(file).items()}
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            parameter.copy_(stored[key])
    if dtype == "bfloat16":
        built.bfloat16()
    loaded = family.load_transformer(CPU)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    conditioning = conditioning_of(family)
    x, time = noise(family), torch.full((2,), 0.7)
    with torch.no_grad():
        ours = family.velocity(built.train(), x, time, conditioning)
        theirs = family.velocity(loaded, x, time, conditioning)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_sd3_reads_its_position_table_from_disk(folders: Folders, tmp_path: Path) -> None:
    """Learners fill in parameters only, and the published table is rounded to half precision."""
    from safetensors.torch import save_file

    shutil.copytree(folders("StableDiffusion3Pipeline"), tmp_path / "half")
    family = open_generator(CASES["sd3"].config(tmp_path / "half"))
    (file,) = family.transformer_files()
    state = load_file(file)
    state["pos_embed.pos_embed"] = state["pos_embed.pos_embed"].half().float()
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(family.build_transformer().pos_embed.pos_embed, state["pos_embed.pos_embed"])
