"""Drawing and scoring groups in this process, and keeping them on disk.

The same rollout worker, process reward model, outcome rewards and credit assignment as in a run; nothing is trained.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actors.sources import EqualStatesOnce, GradientsOfAnother
from actors.spsa import SpsaSource
from euphonium.config import RunConfig, dump_config
from euphonium.errors import ConfigError
from euphonium.files import written_aside
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.rewards.total import weighted_total
from euphonium.text_files import shown
from euphonium.wire.arrays import as_array, as_tensor
from euphonium.wire.devices import local_device
from euphonium.wire.later import Later
from euphonium.wire.records import Array, GroupInfo, GroupPayload, GroupTask, OrmAnswer
from orchestrator.groups.prompts import PromptStream, read_prompts
from orchestrator.state.checkpoints import RESOLVED

if TYPE_CHECKING:
    from actors.sampler import ProcessRewardSource, SourceFactory

_ARRAYS = ("states", "rows", "next_rows", "steps", "log_probs")


@dataclass(frozen=True)
class DrawnGroup:
    """A group with everything that is known of it.

    Attributes:
        info: its description.
        payload: its trained transitions.
        latents: float32 ``[group, *latent]``, its samples.
        scores: outcome rewards by name, ``[group]`` each.
    """

    info: GroupInfo
    payload: GroupPayload
    latents: Array
    scores: OrmAnswer


class Drawer:
    """Draws and scores the groups of a recipe, with the generator's own weights.

    Attributes:
        worker: the rollout worker.
        scorer: decoder and outcome rewards.
    """

    def __init__(self, config: RunConfig) -> None:
        from actors.rollout import RolloutWorker
        from reward_servers.orm import OrmScorer

        self.config = config
        device = local_device()
        self.worker = RolloutWorker(config, device)
        self.scorer = OrmScorer(config.rewards.outcome, self.worker.family, device, config.pools.orm)
        process = config.rewards.process
        self._prm = ProcessRewardModel.load(Path(process.path), config.model).to(device) if process else None
        self._prompts = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)

    def draw(self, ordinal: int, iteration: int, prompt: str | None = None) -> DrawnGroup:
        """Draws the group with this ordinal, as a run would in an iteration (from 0), or another prompt with its seed.

        Raises:
            EuphoniumError: samples or rewards are not finite, or a reward failed.
        """
        task = self._prompts.task(ordinal, iteration)
        if prompt is not None:
            task = dataclasses.replace(task, prompt=prompt)
        info, latents, payload = self.worker.generate(task, self._sources(task))
        scores = self.scorer.score(latents, [task.prompt] * len(latents), self.config.rewards.optional)
        return DrawnGroup(info, payload, latents, scores)

    def _sources(self, task: GroupTask) -> SourceFactory | None:
        guidance, prm = self.config.sampler.guidance, self._prm

        def rewards(conditioning: Any, table: Any, _velocity: Any) -> ProcessRewardSource:
            assert prm is not None
            return EqualStatesOnce(LocalRewards(prm, conditioning, table.sigmas))

        if guidance is None or guidance.source == "prm":
            return rewards if prm is not None else None
        settings = guidance.spsa

        def gradients(_conditioning: Any, table: Any, velocity: Any) -> ProcessRewardSource:
            return SpsaSource(
                table, velocity, lambda x: self._totals(x, task.prompt), perturbations=settings.perturbations,
                scale=settings.scale, seed=task.seed,
            )  # fmt: skip

        if prm is None:
            return gradients
        return lambda *of_group: GradientsOfAnother(rewards(*of_group), gradients(*of_group))

    def _totals(self, latents: torch.Tensor, prompt: str) -> Later[torch.Tensor]:
        config = self.config.rewards
        scores = self.scorer.score(latents.cpu().numpy(), [prompt] * len(latents), config.optional)
        totals = weighted_total(scores, config.outcome, len(latents)).astype(np.float32)
        return Later(lambda: as_tensor(totals))


def write_recipe(config: RunConfig, folder: Path) -> None:
    """Writes the recipe that groups are drawn with beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / RESOLVED) as file:
        file.write_text(dump_config(config), encoding="utf-8")


def save_group(group: DrawnGroup, folder: Path) -> Path:
    """Writes a group as one safetensors file; returns it."""
    from safetensors.torch import save_file

    info, payload = group.info, group.payload
    tensors = {name: as_tensor(getattr(payload, name)).clone() for name in _ARRAYS}
    tensors |= {"latents": as_tensor(group.latents).clone(), "info_rows": as_tensor(info.rows).clone()}
    optional = {"gradients": payload.gradients, "process_rewards": info.process_rewards}
    tensors |= {name: as_tensor(array).clone() for name, array in optional.items() if array is not None}
    tensors |= {f"conditioning.{name}": as_tensor(array).clone() for name, array in payload.conditioning.items()}
    tensors |= {f"score.{name}": as_tensor(array).clone() for name, array in group.scores.items()}
    about = {
        "task": dataclasses.asdict(info.task), "policy_version": info.policy_version, "fingerprint": info.fingerprint,
        "seconds": info.seconds, "payload_bytes": info.payload_bytes,
    }  # fmt: skip
    file = folder / f"iteration_{info.task.iteration:06d}" / f"group_{info.task.group_id:06d}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        save_file(tensors, aside, {"group": json.dumps(about)})
    return file


def load_group(file: Path) -> DrawnGroup:
    """Reads a group.

    Raises:
        ConfigError: the file is no group.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            about = json.loads((stream.metadata() or {})["group"])
            arrays = {name: as_array(stream.get_tensor(name)) for name in stream.keys()}  # noqa: SIM118 - no mapping
        payload = GroupPayload(
            **{name: arrays[name] for name in _ARRAYS}, gradients=arrays.get("gradients"),
            conditioning=_below("conditioning.", arrays),
        )  # fmt: skip
        info = GroupInfo(
            task=GroupTask(**about.pop("task")), rows=arrays["info_rows"],
            process_rewards=arrays.get("process_rewards"), **about,
        )  # fmt: skip
        return DrawnGroup(info, payload, arrays["latents"], _below("score.", arrays))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{shown(file)} is no drawn group ({error}); draw it again with debug rollout") from error


def _below(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def saved_iterations(folder: Path) -> list[list[Path]]:
    """The files of every iteration's groups, in order.

    Raises:
        ConfigError: there are none.
    """
    iterations = [sorted(part.glob("group_*.safetensors")) for part in sorted(folder.glob("iteration_*"))]
    found = [files for files in iterations if files]
    if not found:
        raise ConfigError(
            f"{shown(folder)} holds no drawn groups; draw some with: euphonium debug rollout RECIPE -o it"
        )
    return found
