"""Metrics of an iteration's updates: sums over rows, reduced over the ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from euphonium.config import ObjectiveConfig
from learners.engine.collectives import gathered, reduced
from learners.policy.objective import ObjectiveValue, OutputGradients

SUMMED = ("rows", "loss", "clipped", "ratio", "log_ratio_squared", "kl_anchor", "kl_previous", "error", "preferred")


class UpdateStatistics:
    """Sums over one rank's micro-batches of an iteration.

    Attributes:
        norms: gradient norm of each update so far.
        gradients: gradients with respect to the network's output, by step.
    """

    # Work is cut into as many parts as there are replicas; ``sharing`` ranks compute each of them.
    def __init__(self, replicas: int, num_steps: int, sharing: int = 1) -> None:
        self.norms: list[float] = []
        self.gradients = OutputGradients(num_steps, sharing)
        self._replicas = replicas
        self._sums = dict.fromkeys(SUMMED, 0.0)
        self._before = dict(self._sums)
        self._deviations: list[float] = []

    def begin_update(self) -> None:
        """Makes :meth:`of_this_update` count from here."""
        self._before = dict(self._sums)

    def add(self, value: ObjectiveValue, *, on_policy: bool) -> None:
        """Adds a micro-batch.

        Args:
            value: its loss and the statistics of its rows.
            on_policy: whether it belongs to the first update and was drawn by the present policy, so that rollout and
                learner must agree on its probabilities.
        """
        sums = self._sums
        sums["rows"] += len(value.ratio)
        sums["loss"] += value.loss.item() / self._replicas
        sums["clipped"] += value.clipped.sum().item()
        sums["ratio"] += value.ratio.sum().item()
        sums["log_ratio_squared"] += value.ratio.log().square().sum().item()
        sums["kl_anchor"] += value.kl_anchor.sum().item()
        sums["kl_previous"] += value.kl_previous.sum().item()
        sums["error"] += value.error.sum().item()
        sums["preferred"] += value.preferred.sum().item()
        if on_policy:
            self._deviations += value.deviation.tolist()

    def deviations(self) -> dict[str, float]:
        """Mean and 99th percentile over all ranks of |ratio - 1| before the first update; all ranks must call it.

        Zero where no group was drawn by the present policy.
        """
        found = np.array(gathered(self._deviations) or [0.0])
        return {
            "policy/ratio_deviation": float(found.mean()),
            "policy/ratio_deviation_p99": float(np.quantile(found, 0.99)),
        }

    def of_this_update(self) -> dict[str, float]:
        """This rank's sums since :meth:`begin_update`."""
        return {name: self._sums[name] - self._before[name] for name in SUMMED}

    def reduced(self, device: torch.device) -> dict[str, float]:
        """Metrics over all ranks, each of which must call this.

        Args:
            device: device of the collective operations.
        """
        watched = self.gradients
        by_step = {f"squares {k}": float(value) for k, value in enumerate(watched.squares)}
        by_step |= {f"states {k}": float(value) for k, value in enumerate(watched.states)}
        totals = reduced(device, self._sums | by_step, "sum")
        count = totals["rows"]
        return {
            **{
                f"policy/step_gradient/{k:02d}": (totals[f"squares {k}"] / totals[f"states {k}"]) ** 0.5
                for k in range(len(watched.states))
                if totals[f"states {k}"]
            },
            "policy/loss": totals["loss"] / len(self.norms),
            "policy/ratio_mean": totals["ratio"] / count,
            "policy/clip_fraction": totals["clipped"] / count,
            "policy/approx_kl": 0.5 * totals["log_ratio_squared"] / count,
            "policy/grad_norm": sum(self.norms) / len(self.norms),
            "policy/transitions": count,
            "kl/anchor": totals["kl_anchor"] / count,
            "kl/previous": totals["kl_previous"] / count,
            "policy/denoising_error": totals["error"] / count,
            "policy/preference_accuracy": totals["preferred"] / count,
        }


def reported(metrics: Mapping[str, float], objective: ObjectiveConfig) -> dict[str, float]:
    """Those of the metrics that mean something under an objective."""
    without: tuple[str, ...] = () if objective.kl is not None else ("kl/",)
    if objective.noises_samples:
        without += ("policy/ratio", "policy/clip_fraction", "policy/approx_kl")
    else:
        without += ("policy/denoising_error",)
    if objective.kind != "dpo":
        without += ("policy/preference_accuracy",)
    return {name: number for name, number in metrics.items() if not name.startswith(without)}
