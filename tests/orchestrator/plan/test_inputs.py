"""The conditionings that plans are made of are those of the families' own prompt encoders."""

import pytest

from euphonium.generators.registry import FAMILIES
from orchestrator.plan.inputs import PROMPTS, conditioning
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


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_has_as_many_rows(batch: int, folders: Folders) -> None:
    assert {len(tensor) for tensor in conditioning(family_of("wan", folders), batch).values()} == {batch}
