"""Weights that a policy starts from: another run's, and a LoRA's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from euphonium.config import LoraConfig, RunConfig
from euphonium.errors import ConfigError
from euphonium.generators.lora import add_adapter, load_adapter
from learners.policy.checkpoint import AVERAGE_FILE, POLICY_FILE
from learners.policy.start import LORA_FILE, check_start, start_weights
from orchestrator.commands.launch import preflight
from orchestrator.export_policy import export_adapter
from tests.euphonium.generators.cases import CPU, conditioning_of, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders
from tests.orchestrator.test_export_families import LORA, run_of, trained


@pytest.mark.parametrize("alpha", [LORA.alpha, 8.0])
@pytest.mark.parametrize("name", ["flux", "wan", "sd1"])
def test_a_lora_goes_on_as_what_it_was_with_any_alpha(
    name: str, alpha: float, folders: Folders, tmp_path: Path
) -> None:
    family = family_of(name, folders, lora=LoraConfig(rank=LORA.rank, alpha=alpha))
    before = trained(name, folders, tmp_path / "checkpoint")
    export_adapter(tmp_path / "checkpoint", run_of(name, family.folder), tmp_path / "lora")
    for path in (tmp_path / "lora", tmp_path / "lora" / LORA_FILE):
        assert check_start(path, family).endswith(f"weights of {path}")
    after = family.load_transformer(CPU)
    add_adapter(after, family.config.lora or LORA)
    load_adapter(after, start_weights(tmp_path / "lora", family))
    conditioning, x, time = conditioning_of(family), noise(family), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        outputs = [family.velocity(network, x, time, conditioning) for network in (before, after)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=5e-5, rtol=1e-4)


def test_a_checkpoint_gives_its_moving_average_or_else_the_policy(folders: Folders, tmp_path: Path) -> None:
    family = family_of("wan a14b", folders, trained="low_noise")
    state = {n: p.detach() for n, p in family.load_transformer(CPU).named_parameters() if family.trains(n)}
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / POLICY_FILE)
    assert check_start(tmp_path, family) == f"{len(state)} weights of {tmp_path}"
    found = start_weights(tmp_path, family)
    assert all(torch.equal(found[name], state[name] + 1) for name in state)
    save_file({name: tensor + 2 for name, tensor in state.items()}, tmp_path / AVERAGE_FILE)
    assert torch.equal(start_weights(tmp_path, family)[min(state)], state[min(state)] + 2)
    with pytest.raises(ConfigError, match=r"does not have the weights that this recipe trains: \d+ differ.*none inst"):
        check_start(tmp_path, family_of("wan a14b", folders))


def test_what_does_not_fit_is_refused_with_what_to_do(folders: Folders, tmp_path: Path) -> None:
    family = family_of("flux", folders, lora=LORA)
    trained("flux", folders, tmp_path / "checkpoint")
    export_adapter(tmp_path / "checkpoint", run_of("flux", family.folder), tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / LORA_FILE)
    save_file({f"lora_unet_{i}.alpha": t for i, t in enumerate(tensors.values())}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "lora" / LORA_FILE).read_bytes()[:50])
    for path, model, message in [
        ("none", {"lora": LORA}, r"^start_from: \S+none is neither a checkpoint .* nor a LoRA"),
        ("lora", {}, r"is a LoRA, and this recipe trains all weights; set model\.lora, or"),
        ("lora", {"lora": LoraConfig(rank=3)}, r"has the rank 2, and model\.lora\.rank is 3; set it to that"),
        ("lora", {"lora": LoraConfig(rank=2, targets=("to_q",))}, r"does not have the weights .* set model\.lora"),
        ("other.safetensors", {"lora": LORA}, r"not in the form .* FluxPipeline \(lora_unet_0\.alpha\)"),
        ("cut.safetensors", {"lora": LORA}, r"cut\.safetensors cannot be read .* copy it again"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_start(tmp_path / path, family_of("flux", folders, **model))


def test_validate_says_what_a_run_starts_from(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^start_from: \S+nothing is neither a checkpoint"):
        preflight(make_config(f"start_from={tmp_path}/nothing"))
