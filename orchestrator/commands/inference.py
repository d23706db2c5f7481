"""Sampling and scoring outside of a run, in this process: the commands ``generate`` and ``evaluate``.

Three protocols (Euphonium, Table 6): ``distilled`` and ``implicit`` sample the policy alone, ``inference_rgg`` keeps
the reward gradient in the ODE and needs the process reward model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from euphonium.config import GuidanceConfig, ModelConfig, RunConfig, load_config
from euphonium.errors import CheckpointError, ConfigError
from euphonium.files import MANIFEST
from euphonium.generators.sample_size import SampleSize, read_sample_size
from euphonium.rewards.total import total_weight, weighted_total
from euphonium.wire.devices import local_device
from euphonium.wire.records import Array
from orchestrator.report.recorded import RESOLVED
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

    trained_for = "distilled" if config.objective.kind == "distill" else "implicit"
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


def require_prepared(config: RunConfig, prompts: Sequence[str]) -> None:
    """Checks that prompts are among those that a run has encoded already, if it has.

    Raises:
        ConfigError: some are not; names them, and what to do.
    """
    from euphonium.generators.embeddings import check_embeddings
    from euphonium.generators.registry import open_generator

    if config.prompts.embeddings is not None:
        check_embeddings(config.prompts.embeddings, open_generator(config.model), prompts)


def inference_guidance(config: RunConfig) -> GuidanceConfig:
    """The guidance of a run's rollouts for an ODE with any number of steps: its window becomes a range of time.

    Raises:
        ConfigError: this run's guidance cannot be kept at inference.
    """
    guidance = config.sampler.guidance
    if guidance is None or guidance.source != "prm":
        raise ConfigError("--protocol inference_rgg: this run was not guided by a process reward model")
    if guidance.scale is None:
        raise ConfigError(
            "--protocol inference_rgg: guidance by beta vanishes without noise; only guidance.scale can be kept"
        )
    from euphonium.generators.registry import open_generator

    table = open_generator(config.model).step_table(config.sampler)
    steps = table.guided_steps
    if not steps:
        raise ConfigError("--protocol inference_rgg: sampler.guidance.scale is 0, so no step was guided")
    # A step lasts until the next one begins: up to there finer steps are guided, too.
    begin, end = (1 - float(table.sigmas[k]) for k in (steps[0], steps[-1] + 1))
    window = guidance.time_window or (begin, end)
    return guidance.model_copy(update={"window": None, "time_window": window})


def _prm_in_process(config: RunConfig, device: torch.device) -> SourceFactory:
    from euphonium.rewards.process import LocalRewards, ProcessRewardModel

    assert config.rewards.process is not None  # guidance by a PRM needs one: checked with the recipe
    model = ProcessRewardModel.load(Path(config.rewards.process.path), config.model).to(device)
    return lambda conditioning, table, velocity: LocalRewards(model, conditioning, table.sigmas)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How clips are drawn.

    Attributes:
        seed: seed of the noise; prompt number i uses ``seed + i``.
        steps: number of ODE steps.
        protocol: as for :func:`open_policy`; a diffusers folder can only be sampled without the reward gradient.
        size: height, width and frames, as far as they differ from those of the run.
    """

    seed: int
    steps: int
    protocol: Protocol | None = None
    size: SampleSize = field(default_factory=dict)


def generate_clips(model: Path, prompts: list[str], output: Path, drawing: Drawing) -> list[Path]:
    """Draws one clip a prompt, and saves them.

    Args:
        model: diffusers folder, checkpoint, or run folder (whose newest checkpoint is taken).
        prompts: texts.
        output: folder for GIFs and contact sheet.
        drawing: how they are drawn.

    Returns:
        The files written.

    Raises:
        ConfigError: the model cannot draw them so.
        CheckpointError: there is no undamaged checkpoint.
    """
    from orchestrator.report.pictures import save_samples

    if (model / "model_index.json").is_file():
        if drawing.protocol == "inference_rgg":
            raise ConfigError("--protocol inference_rgg needs the process reward model: give the run's folder")
        videos = _draw_with_diffusers(model, prompts, drawing)
    else:
        checkpoint, config = open_checkpoint(model)
        evaluation = config.evaluation.model_copy(update={"num_steps": drawing.steps})
        config = config.model_copy(update={"evaluation": evaluation, "model": resized(config.model, drawing.size)})
        require_prepared(config, prompts)
        policy = open_policy(checkpoint, config, protocol=drawing.protocol)
        latents = policy.sample(prompts, [drawing.seed + i for i in range(len(prompts))])
        decode = policy.worker.family.load_decoder(policy.worker.device)
        decoded = torch.cat([decode(torch.from_numpy(part)) for part in np.split(latents, len(latents))])
        videos = decoded.permute(0, 1, 3, 4, 2).cpu().numpy()
    pixels = (videos * 255).round().astype(np.uint8)
    save_samples(output, prompts, pixels, {})
    return [*(output / f"{i:02d}.gif" for i in range(len(prompts))), output / "contact_sheet.png"]


def resized(model: ModelConfig, size: SampleSize) -> ModelConfig:
    """A generator's settings with another size of its samples; raises as :func:`checked_size`."""
    return model.model_copy(update=checked_size(size))


def checked_size(size: SampleSize) -> SampleSize:
    """The size; raises ConfigError if one of its numbers is not above 0."""
    for name, value in size.items():
        if value < 1:
            raise ConfigError(f"--{name}: must be above 0, got {value}")
    return size


def _draw_with_diffusers(folder: Path, prompts: list[str], drawing: Drawing) -> Array:
    """Videos ``[prompts, frames, height, width, 3]`` in [0, 1], drawn by the diffusers pipeline itself."""
    from euphonium.generators.components import load_pipeline

    pipeline = load_pipeline(folder)
    size = _size_for(pipeline, folder, drawing.size)
    pipeline.set_progress_bar_config(disable=len(prompts) > 1)
    pipeline.to(local_device())
    videos = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(drawing.seed + i)
        result = pipeline(prompt, num_inference_steps=drawing.steps, generator=generator, output_type="np", **size)
        videos.append(np.asarray(result.frames[0] if hasattr(result, "frames") else result.images[:1]))
    return np.stack(videos)


def _size_for(pipeline: Any, folder: Path, size: SampleSize) -> dict[str, int]:
    """Arguments of a pipeline's call for a size: that of its export, or of the run whose folder it is in, unless given.

    Raises:
        ConfigError: the pipeline takes no number of frames, or no image alone.
    """
    taken = inspect.signature(pipeline.__call__).parameters
    if "image" in taken and taken["image"].default is inspect.Parameter.empty:
        raise ConfigError(f"{folder} is a {type(pipeline).__name__}, which needs an image with each prompt")
    known = read_sample_size(folder)
    described = folder.parent / RESOLVED
    if not known and described.is_file():
        run: RunConfig = load_config(described)
        known = {"height": run.model.height, "width": run.model.width, "frames": run.model.frames}
    wanted = known | checked_size(size)
    frames = wanted.pop("frames", None)
    if "num_frames" in taken and frames is not None:
        return wanted | {"num_frames": frames}
    if frames not in (None, 1):
        raise ConfigError(f"--frames: {folder} is a {type(pipeline).__name__}, which makes images; leave it out")
    return wanted


def evaluate_model(
    path: Path, *, base: bool, changes: dict[str, int], size: SampleSize, protocol: Protocol | None = None
) -> dict[str, Any]:
    """Scores a checkpoint, or the generator that its run started from, on the run's held-out prompts.

    Args:
        path: checkpoint or run folder.
        base: score the generator before training.
        changes: fields of the run's ``evaluation`` to replace.
        size: height, width and frames of the samples, as far as they differ from those of the run.
        protocol: as for :func:`open_policy`.

    Returns:
        Mean and standard error of every reward and of their weighted total.
    """
    from orchestrator.evaluation import evaluation_set
    from reward_servers.orm import OrmScorer

    checkpoint, config = open_checkpoint(path)
    try:
        evaluation = type(config.evaluation).model_validate(config.evaluation.model_dump() | changes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = config.model_copy(update={"evaluation": evaluation, "model": resized(config.model, size)})
    prompts, seeds = evaluation_set(config)
    require_prepared(config, prompts)
    policy = open_policy(checkpoint, config, base=base, protocol=protocol)
    worker, rewards = policy.worker, config.rewards.outcome
    scorer = OrmScorer(rewards, worker.family, worker.device, config.pools.orm)
    droppable = [reward.name for reward in rewards if reward.on_failure == "drop_group"]
    scores = scorer.score(policy.sample(prompts, seeds), prompts, droppable)
    missing = [reward.name for reward in rewards if reward.name not in scores]
    if total_weight(rewards) and not any(reward.weight and reward.name in missing for reward in rewards):
        scores["total"] = weighted_total(scores, rewards, len(prompts)) / total_weight(rewards)
    return {
        "model": str(config.model.path) if base else str(checkpoint.folder),
        "protocol": protocol or "without reward gradient",
        "prompts": len(prompts),
        **({"missing": missing} if missing else {}),
        **{
            name: {"mean": round(float(v.mean()), 5), "standard_error": round(float(v.std() / len(v) ** 0.5), 5)}
            for name, v in scores.items()
        },
    }
