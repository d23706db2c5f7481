"""Sampling and scoring outside of a run: what ``generate`` and ``evaluate`` do, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import RunConfig, load_config
from core.errors import CheckpointError, ConfigError
from orchestrator.checkpoints import CONFIG, Checkpoint, CheckpointStore, verify


def open_checkpoint(path: Path) -> tuple[Checkpoint, RunConfig]:
    """A verified checkpoint, given its folder or the run's, and the configuration of its run.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "checkpoints").is_dir():
        checkpoint = CheckpointStore(path / "checkpoints", keep_last=1).newest()
        if checkpoint is None:
            raise CheckpointError(f"{path} holds no good checkpoint")
    else:
        checkpoint = verify(path)
    return checkpoint, load_config(checkpoint.folder / CONFIG)


def generate_clips(model: Path, prompts: list[str], output: Path, *, seed: int, steps: int) -> list[Path]:
    """Draws one clip a prompt with the plain diffusers pipeline.

    Args:
        model: diffusers folder, checkpoint, or run folder (whose newest checkpoint is taken).
        prompts: texts.
        output: folder for GIFs and contact sheet.
        seed: of the noise; prompt number i uses ``seed + i``.
        steps: ODE steps.

    Returns:
        The files written.
    """
    import tempfile

    from diffusers import DiffusionPipeline

    from orchestrator.export import export_checkpoint
    from orchestrator.pictures import save_samples

    with tempfile.TemporaryDirectory() as scratch:
        shape: dict[str, Any] = {}
        if (model / "model_index.json").is_file():
            folder = model
            described = model.parent / "config.resolved.yaml"
            config = load_config(described) if described.is_file() else None
        else:
            checkpoint, config = open_checkpoint(model)
            folder = Path(scratch) / "pipeline"
            export_checkpoint(checkpoint.folder, config, folder)
        if config is not None:
            m = config.model
            shape = {"num_frames": m.frames, "height": m.height, "width": m.width}
        pipeline = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        pipeline.set_progress_bar_config(disable=len(prompts) > 1)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        videos = []
        for i, prompt in enumerate(prompts):
            result = pipeline(
                prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed + i),
                output_type="np", **shape,
            )  # fmt: skip
            videos.append((np.asarray(result.frames[0]) * 255).round().astype(np.uint8))
    save_samples(output, prompts, np.stack(videos), {})
    return [*(output / f"{i:02d}.gif" for i in range(len(prompts))), output / "contact_sheet.png"]


def evaluate_model(path: Path, *, base: bool, changes: dict[str, int]) -> dict[str, Any]:
    """Scores a checkpoint, or the generator that its run started from, on the run's held-out prompts.

    Args:
        path: checkpoint or run folder.
        base: score the generator before training.
        changes: fields of the run's ``evaluation`` to replace.

    Returns:
        Mean and standard error of every reward and of their weighted total.
    """
    from safetensors.torch import load_file

    from actors.rollout import RolloutWorker
    from learners.checkpoint import AVERAGE_FILE, POLICY_FILE
    from orchestrator.evaluation import evaluation_set
    from reward_servers.orm import OrmScorer

    checkpoint, config = open_checkpoint(path)
    try:
        evaluation = type(config.evaluation).model_validate(config.evaluation.model_dump() | changes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = config.model_copy(update={"evaluation": evaluation})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worker = RolloutWorker(config, device)
    if not base:
        average = checkpoint.folder / AVERAGE_FILE
        worker.transformer.load_state_dict(load_file(average if average.is_file() else checkpoint.folder / POLICY_FILE))
    prompts, seeds = evaluation_set(config)
    scores = OrmScorer(config.rewards.outcome, worker.family, device).score(worker.evaluate(prompts, seeds), prompts)
    weights = {reward.name: reward.weight for reward in config.rewards.outcome}
    scale = sum(map(abs, weights.values()))
    weighted = [weights[name] * values.astype(np.float64) for name, values in scores.items()]
    scores["total"] = np.sum(weighted, axis=0) / scale
    return {
        "model": str(config.model.path) if base else str(checkpoint.folder),
        "prompts": len(prompts),
        **{
            name: {"mean": round(float(v.mean()), 5), "standard_error": round(float(v.std() / len(v) ** 0.5), 5)}
            for name, v in scores.items()
        },
    }
