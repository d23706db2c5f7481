"""The refresh of a process reward model during a run: training on the policy's own newest samples.

A process reward model that was trained on the initial policy's samples ranks the current one's worse and worse, and a
policy that follows its gradient finds what it overrates. The outcome rewards of every iteration rank new samples at no
cost; training on them between iterations keeps the model accurate where the policy is now.

Every refresh starts from the weights that the run began with, and trains on all samples in the buffer. A model that
continues from the last refresh has memorised its older samples, and ranks new ones worse for it (as Ash and Adams,
2020, found for warm starts in general).
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from euphonium.config import PrmRefreshConfig, RewardOptimizerConfig, RunConfig
from euphonium.config.base import chosen
from euphonium.errors import LostActorError, TrainingError
from euphonium.generators.conditioning import Conditioning, stack_conditionings
from euphonium.generators.libraries import import_networks
from euphonium.rewards.process import ProcessRewardModel
from euphonium.role_logs import keep_role_log
from euphonium.wire.arrays import as_tensor
from euphonium.wire.deadlines import node_id
from euphonium.wire.devices import reserved_device
from euphonium.wire.records import Array, Readiness
from learners.engine.local import LocalEngine
from learners.rewards.preference import PairObjective, PairSampler, Preferences, paired_rewards
from learners.rewards.preference_files import ranked_pairs
from learners.rewards.training import train_update

STATE_FILE = "refresh.json"
TENSORS_FILE = "refresh.safetensors"
# Pairs of the newest groups on which the model's accuracy is measured before a refresh.
ACCURACY_PAIRS = 64


@dataclass(frozen=True)
class ReplayedGroup:
    """One group in the buffer.

    Attributes:
        iteration: the iteration that it was drawn for.
        latents: float32 ``[group, *latent]``, clean.
        totals: float64 ``[group]``, weighted outcome rewards of the samples.
        conditioning: conditioning of its prompt, with a leading dimension of 1.
    """

    iteration: int
    latents: Tensor
    totals: NDArray[np.float64]
    conditioning: Conditioning


class PrmRefresh:
    """The buffer of the newest groups, and the model that is trained on them.

    Attributes:
        model: the process reward model, float32, which the servers get.
        version: number of refreshes so far.
        pending: iteration whose refresh is due and not done, or None.
    """

    def __init__(self, settings: PrmRefreshConfig, model: ProcessRewardModel, seed: int, device: torch.device) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        self._training = RewardOptimizerConfig(
            updates=settings.updates,
            pairs_per_update=settings.pairs_per_update,
            pairs_per_micro_batch=chosen(
                settings.pairs_per_micro_batch or settings.pairs_per_update,
                "rewards.process.refresh.pairs_per_micro_batch",
            ),
            learning_rate=settings.learning_rate,
            # The weights are already trained: no decay pulls them towards zero.
            weight_decay=0.0,
        )
        self.model = model.to(device).for_training(gradient_checkpointing=settings.gradient_checkpointing)
        self.version = 0
        self.pending: int | None = None
        self._groups: deque[ReplayedGroup] = deque(maxlen=settings.buffer_groups)
        self._start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def add(self, iteration: int, latents: Array, totals: Array, conditioning: dict[str, Array]) -> None:
        """Adds a group to the buffer; with more than ``buffer_groups``, the oldest one is dropped.

        Args:
            iteration: the iteration that it was drawn for.
            latents: float32 ``[group, *latent]``, clean.
            totals: ``[group]``, weighted outcome rewards of the samples.
            conditioning: conditioning of its prompt, with a leading dimension of 1.
        """
        self._groups.append(
            ReplayedGroup(
                iteration=iteration,
                latents=as_tensor(latents).clone(),
                totals=np.asarray(totals, dtype=np.float64),
                conditioning={name: as_tensor(array).clone() for name, array in conditioning.items()},
            )
        )

    def due(self, iteration: int) -> bool:
        """Whether a refresh is due after an iteration (from 1)."""
        return iteration % self.settings.every == 0

    def begin(self, iteration: int) -> None:
        """Notes that an iteration is done: sets :attr:`pending` if a refresh is due."""
        if self.due(iteration):
            self.pending = iteration

    def update(self) -> dict[str, float]:
        """Makes one whole refresh, and returns its metrics."""
        training = self.refresh()
        while True:
            try:
                next(training)
            except StopIteration as end:
                metrics: dict[str, float] = end.value
                return metrics

    def refresh(self) -> Generator[None, None, dict[str, float]]:
        """One refresh as a generator, which yields after every update; closing it early restores the weights.

        Returns:
            Metrics. Accuracy is measured first, on pairs of the newest iteration's groups, which the model has not been
            trained on. Without any pair (all totals closer than the margin) nothing is trained, and metrics are empty.

        Raises:
            TrainingError: the loss is not finite.
        """
        data = self._preferences(list(self._groups))
        if not len(data.pairs):
            self.pending = None
            return {}
        metrics = self._accuracy_on_newest()
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self._start)
        engine = LocalEngine(self.model, self._training, self.device, averages=False, unreached=False)
        # Batches are numbered through all refreshes, so that no refresh repeats the random choices of another.
        first = self.version * self.settings.updates
        objective = PairObjective(data, self.settings.pairs_per_update, self.seed, self.device, first)
        losses = []
        for update in range(self._training.updates):
            losses.append(train_update(engine, objective, self._training, update))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss of update {update + 1} of the process reward model's refresh is not finite: lower "
                    "rewards.process.refresh.learning_rate, or look for samples that are not finite"
                )
            try:
                yield
            except GeneratorExit:
                self.model.load_state_dict(before)
                raise
        self.version += 1
        self.pending = None
        return metrics | {
            "process/refresh_loss": float(np.mean(losses)),
            "process/refresh_pairs": float(len(data.pairs)),
        }

    def weights(self) -> dict[str, Array]:
        """Copies of all weights by name, for :meth:`reward_servers.prm.PrmScorer.load_weights`."""
        return {name: np.array(tensor.detach().cpu().numpy()) for name, tensor in self.model.state_dict().items()}

    def _accuracy_on_newest(self) -> dict[str, float]:
        newest = self._groups[-1].iteration
        data = self._preferences([group for group in self._groups if group.iteration == newest])
        if not len(data.pairs):
            return {}
        pairs, sigma, noise = PairSampler(data, ACCURACY_PAIRS, self.seed + 1).draw(self.version)
        self.model.eval()
        with torch.no_grad():
            winners, losers = paired_rewards(self.model, data, pairs, sigma.to(self.device), noise.to(self.device))
        return {"process/refresh_accuracy": float((winners > losers).float().mean())}

    def _preferences(self, groups: list[ReplayedGroup]) -> Preferences:
        # Every group counts as a prompt of its own, also if two have the same text: their noise may differ.
        prompt = np.repeat(np.arange(len(groups)), [len(group.latents) for group in groups])
        latents = torch.cat([group.latents for group in groups])
        return Preferences(
            latents=latents,
            latent_shape=tuple(latents.shape[1:]),
            prompt=prompt,
            conditioning=stack_conditionings([group.conditioning for group in groups]),
            pairs=ranked_pairs(prompt, np.concatenate([group.totals for group in groups]), self.settings.margin),
        )

    def save(self, folder: Path) -> None:
        """Writes model and buffer; the folder can also be loaded as a process reward model."""
        self.model.save(folder, refreshes=self.version)
        tensors: dict[str, Tensor] = {}
        for i, group in enumerate(self._groups):
            tensors[f"group.{i}.latents"] = group.latents
            tensors |= {f"group.{i}.conditioning.{name}": t.contiguous() for name, t in group.conditioning.items()}
        save_file(tensors, folder / TENSORS_FILE)
        state = {
            "version": self.version,
            "pending": self.pending,
            "groups": [{"iteration": g.iteration, "totals": g.totals.tolist()} for g in self._groups],
        }
        (folder / STATE_FILE).write_text(json.dumps(state) + "\n")

    def restore(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote."""
        from euphonium.rewards.process import WEIGHTS_FILE

        self.model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        tensors, state = load_file(folder / TENSORS_FILE), json.loads((folder / STATE_FILE).read_text())
        # Checkpoints from before a refresh could be put off have none that waits.
        self.version, self.pending = int(state["version"]), state.get("pending")
        self._groups.clear()
        for i, group in enumerate(state["groups"]):
            prefix = f"group.{i}.conditioning."
            self._groups.append(
                ReplayedGroup(
                    iteration=group["iteration"],
                    latents=tensors[f"group.{i}.latents"],
                    totals=np.array(group["totals"]),
                    conditioning={k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
                )
            )


class PrmRefreshActor:
    """The Ray actor around a :class:`PrmRefresh`.

    A restarted actor has lost its buffer. So that this is noticed, ``add``, ``begin``, ``go_on`` and ``save`` raise
    until :meth:`restore` has been called.
    """

    def __init__(self, config: RunConfig) -> None:
        keep_role_log(config.run_dir, "prm-refresh")
        torch.set_num_threads(config.pools.refresh_pool.threads)
        self.config = config
        import_networks()
        self.refresh = self._fresh()
        self._restored = False
        self._training: Generator[None, None, dict[str, float]] | None = None

    def _fresh(self) -> PrmRefresh:
        process = self.config.rewards.process
        assert process is not None
        assert process.refresh is not None
        device = reserved_device(self.config.pools.refresh_pool.num_gpus)
        model = ProcessRewardModel.load(Path(process.path), self.config.model)
        return PrmRefresh(process.refresh, model, self.config.seed, device)

    def __repr__(self) -> str:
        return "prm-refresh"

    def ready(self) -> Readiness:
        """Answers once the model is loaded, and between updates."""
        return Readiness(device=str(self.refresh.device), node=node_id())

    def restore(self, folder: str | None) -> int:
        """Restores a checkpoint's state, or the initial one if there is none; returns the refreshes so far."""
        self._give_up()
        self.refresh = self._fresh()
        if folder is not None and (Path(folder) / STATE_FILE).is_file():
            self.refresh.restore(Path(folder))
        self._restored = True
        return self.refresh.version

    def _must_be_restored(self) -> None:
        if not self._restored:
            raise LostActorError(
                "the refresh of the process reward model was restarted and has forgotten its samples: it has to take "
                "up a checkpoint first"
            )

    def add(self, iteration: int, latents: Array, totals: Array, conditioning: dict[str, Array]) -> None:
        """Adds a group to the buffer; the arguments are those of :meth:`PrmRefresh.add`.

        Raises:
            LostActorError: the actor was restarted, and :meth:`restore` has not been called since.
        """
        self._must_be_restored()
        self.refresh.add(iteration, latents, totals, conditioning)

    def begin(self, iteration: int) -> None:
        """Notes that an iteration is done, after which a refresh may be due.

        Raises:
            LostActorError: the actor was restarted, and :meth:`restore` has not been called since.
        """
        self._must_be_restored()
        self.refresh.begin(iteration)

    def go_on(self, seconds: float) -> tuple[int, dict[str, float] | None]:
        """Works for some seconds on the refresh that is due, if one is.

        Returns:
            Number of refreshes so far, and the metrics once nothing is left to do, None before.

        Raises:
            LostActorError: the actor was restarted, and :meth:`restore` has not been called since.
            TrainingError: the loss is not finite.
        """
        self._must_be_restored()
        if self.refresh.pending is None:
            return self.refresh.version, {}
        if self._training is None:
            self._training = self.refresh.refresh()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                next(self._training)
            except StopIteration as end:
                self._training = None
                return self.refresh.version, end.value
        return self.refresh.version, None

    def save(self, folder: str) -> None:
        """Writes model and buffer; a refresh under way is abandoned, and stays due.

        Raises:
            LostActorError: the actor was restarted, and :meth:`restore` has not been called since.
        """
        self._must_be_restored()
        self._give_up()
        self.refresh.save(Path(folder))

    def _give_up(self) -> None:
        if self._training is not None:
            self._training.close()
            self._training = None

    def weights(self) -> dict[str, Array]:
        """Copies of all weights by name."""
        return self.refresh.weights()
