"""Trained policies outside of a run, ready to sample.

Three protocols (Euphonium, Table 6): ``distilled`` and ``implicit`` sample the policy alone, ``inference_rgg`` keeps
the reward gradient in the ODE and needs the process reward model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from euphonium.config import GuidanceConfig, ModelConfig, RunConfig, load_config
from euphonium.errors import CheckpointError, ConfigError
from euphonium.files import MANIFEST
from euphonium.generators.sample_size import SampleSize
from euphonium.wire.devices import local_device
from euphonium.wire.records import Array
from orchestrator.state.checkpoints import CONFIG, Checkpoint, CheckpointStore, verify

if TYPE_CHECKING:
    from actors.rollout import RolloutWorker
    from actors.sampler import SourceFactory

Protocol = Literal["implicit", "inference_rgg", "distilled"]


def open_checkpoint(path: Path) -> tuple[Checkpoint, RunConfig]:
    """Opens a checkpoint, given its folder or the run's; returns it with the configuration of its run.

    Raises:
        CheckpointError: there is no undamaged checkpoint.
    """
    if (path / "checkpoints").is_dir():
        checkpoint = CheckpointStore(path / "checkpoints", keep_last=1).newest()
        if checkpoint is None:
            raise CheckpointError(
                f"{path} holds no good checkpoint; let the run write one, or give another run's folder"
            )
    elif (path / MANIFEST).is_file():
        checkpoint = verify(path)
    else:
        if not path.exists():
            raise CheckpointError(f"{path} is not there; give the folder of a run, or one of its checkpoints/step_*")
        raise CheckpointError(
            f"{path} holds neither a run nor a checkpoint; give the folder of a run, or one of its checkpoints/step_*"
        )
    return checkpoint, load_config(checkpoint.folder / CONFIG)


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy ready to sample by one protocol.

    Attributes:
        config: configuration of its run.
        worker: a rollout worker with the policy's weights.
        guidance: guidance of the sampling, or None.
        make_source: source of the reward gradient, or None.
    """

    config: RunConfig
    worker: RolloutWorker
    guidance: GuidanceConfig | None
    make_source: SourceFactory | None

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Array:
        """Draws latents ``[len(prompts), *latent]``, one a prompt and seed."""
        return self.worker.evaluate(prompts, seeds, self.make_source, self.guidance)


def open_policy(
    checkpoint: Checkpoint, config: RunConfig, *, base: bool = False, protocol: Protocol | None = None
) -> TrainedPolicy:
    """Loads the policy of a checkpoint (its moving average where there is one).

    Args:
        checkpoint: the checkpoint.
        config: configuration of its run.
        base: load the generator before training instead.
        protocol: None takes the one that fits the run's objective.

    Raises:
        ConfigError: this run has not trained for the protocol.
    """
    from safetensors.torch import load_file

    from actors.rollout import RolloutWorker
    from euphonium.generators.components import check_generator
    from euphonium.generators.registry import open_generator
    from learners.policy.checkpoint import weights_file

    trained_for = "implicit" if config.objective.kind == "standard" else "distilled"
    if protocol in ("implicit", "distilled") and protocol != trained_for and not base:
        raise ConfigError(
            f"--protocol {protocol}: this policy was trained with objective.kind: {config.objective.kind}; sampling it "
            f"without the reward gradient is the protocol {trained_for}"
        )
    check_generator(open_generator(config.model))
    device = local_device()
    worker = RolloutWorker(config, device)
    if not base:
        state = load_file(weights_file(checkpoint.folder))
        with torch.no_grad():
            for name, parameter in worker.published.items():
                parameter.copy_(state[name])
    if protocol != "inference_rgg":
        return TrainedPolicy(config, worker, None, None)
    guidance = inference_guidance(config)
    return TrainedPolicy(config, worker, guidance, _prm_in_process(config, device))


def check_prompts_of(config: RunConfig, prompts: Sequence[str]) -> None:
    """Checks that a run can draw prompts: they are encoded already, if its are; warns of those that are cut.

    Raises:
        ConfigError: some are not; names them, and what to do.
    """
    from euphonium.generators.embeddings import check_embeddings
    from euphonium.generators.prompt_length import warn_of_cut_prompts
    from euphonium.generators.registry import open_generator

    generator = open_generator(config.model)
    if config.prompts.embeddings is not None:
        check_embeddings(config.prompts.embeddings, generator, prompts)
    warn_of_cut_prompts(generator, prompts)


def inference_guidance(config: RunConfig) -> GuidanceConfig:
    """The guidance of a run's rollouts for an ODE with any number of steps: its window becomes a range of time.

    An ODE has no noise: guidance in units of it pushes as far in all as it pushed a rollout, evenly over that time.

    Raises:
        ConfigError: this run's guidance cannot be kept at inference.
    """
    guidance = config.sampler.guidance
    if guidance is None or guidance.source != "prm":
        raise ConfigError("--protocol inference_rgg: this run was not guided by a process reward model")
    from euphonium.generators.registry import open_generator

    generator = open_generator(config.model)
    table = generator.step_table(config.sampler)
    steps = table.guided_steps
    if not steps:
        raise ConfigError("--protocol inference_rgg: sampler.guidance.scale is 0, so no step was guided")
    if guidance.scale is None or guidance.scale_per == "step":
        rates = table.coef_grad[steps] / (table.sigmas[:-1] - table.sigmas[1:])[steps]
        if not torch.allclose(rates, rates[0].expand_as(rates), rtol=1e-9, atol=0):
            raise ConfigError(
                f"--protocol inference_rgg: guidance by beta under the law {config.sampler.law}, or scaled per step, "
                "has no rate that an ODE could keep, as guidance by beta has under the law dance; only guidance.scale "
                "can be kept"
            )
        guidance = guidance.model_copy(update={"beta": None, "scale": float(rates[0]), "scale_per": "time"})
    # A step lasts until the next one begins: up to there finer steps are guided, too.
    begin, end = (1 - float(table.sigmas[k]) for k in (steps[0], steps[-1] + 1))
    window = guidance.time_window or (begin, end)
    assert guidance.scale is not None
    # Steps between those that were guided are finer steps' guided time, too: the same push spread evenly.
    spread: dict[str, object] = {"every": 1, "scale": guidance.scale / guidance.every}
    if guidance.normalise == "noise":
        from actors.guidance import noise_length

        size = math.prod(generator.latent_shape)
        pushed = sum(float(table.coef_grad[k]) * noise_length(table, k, size) for k in steps)
        spread |= {"normalise": True, "scale": pushed / (window[1] - window[0])}
    return guidance.model_copy(update={"window": None, "time_window": window, **spread})


def _prm_in_process(config: RunConfig, device: torch.device) -> SourceFactory:
    from euphonium.rewards.process import LocalRewards, ProcessRewardModel

    assert config.rewards.process is not None  # guidance by a PRM needs one: checked with the recipe
    model = ProcessRewardModel.load(Path(config.rewards.process.path), config.model).to(device)
    return lambda conditioning, table, velocity: LocalRewards(model, conditioning, table.sigmas)


def resized(model: ModelConfig, size: SampleSize) -> ModelConfig:
    """A generator's settings with another size of its samples; raises as :func:`checked_size`."""
    return model.model_copy(update=checked_size(size))


def checked_size(size: SampleSize) -> SampleSize:
    """The size; raises ConfigError if one of its numbers is not above 0."""
    for name, value in size.items():
        if value < 1:
            raise ConfigError(f"--{name}: must be above 0, got {value}")
    return size
