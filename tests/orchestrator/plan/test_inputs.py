"""The conditionings that plans are made of are those of the families' own prompt encoders."""

from pathlib import Path

import pytest

from euphonium.config import load_config
from euphonium.generators.registry import FAMILIES
from orchestrator.plan.inputs import PROMPTS, conditioning
from orchestrator.plan.passes import Passes
from tests.euphonium.generators.cases import conditioning_of, family_of, one_a_family
from tests.euphonium.generators.tiny_pipelines import Folders


def test_every_family_is_described() -> None:
    assert PROMPTS.keys() == FAMILIES.keys()


@one_a_family
def test_entries_are_those_of_the_encoder(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    planned, real = conditioning(family, 2), conditioning_of(family)
    assert planned.keys() == real.keys()
    for entry, tensor in real.items():
        assert planned[entry].dtype == tensor.dtype, entry
        assert planned[entry].dim() == tensor.dim(), entry
        # All but the length in tokens, of which plans take the most.
        assert (planned[entry].shape[2:], len(planned[entry])) == (tensor.shape[2:], len(tensor)), entry
        if tensor.dim() == 3:
            assert planned[entry].shape[1] >= min(tensor.shape[1], family.config.max_prompt_tokens), entry


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("wan-2.1-i2v/one-gpu-lora.yaml", 630.8e6), ("wan-2.2-ti2v/one-node-i2v-lora.yaml", 0), ("flux/mixgrpo.yaml", 0)],
)
def test_what_reads_pictures_is_counted(recipe: str, parameters: float) -> None:
    """CLIP's vision half reads the pictures of Wan 2.1, in float32; nothing but the VAE those of Wan 2.2."""
    passes = Passes(load_config(Path("recipes") / recipe))
    assert passes.image_encoder_bytes == pytest.approx(4 * parameters, rel=1e-3)


@pytest.mark.parametrize(("trained", "share"), [("both", 1.0), ("low_noise", 0.5)])
def test_of_two_transformers_the_trained_one_is_counted(trained: str, share: float) -> None:
    overrides = [f"model.trained={trained}"]
    size = Passes(load_config(Path("recipes/wan-2.2-a14b/one-node-low-noise.yaml"), overrides)).network_size
    assert size.trained == pytest.approx(share * size.parameters, rel=1e-3)
    assert size.parameters == pytest.approx(28.58e9, rel=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_has_as_many_rows(batch: int, folders: Folders) -> None:
    assert {len(tensor) for tensor in conditioning(family_of("wan", folders), batch).values()} == {batch}
