"""Estimates of the divergence between successive policies, and the adaptive weight of a KL penalty (SAGE-GRPO, A.6)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


def log_ratio_estimate(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """SAGE-GRPO's Eq. 15: ``log pi_old - log pi``, on samples of the old policy.

    Unbiased for KL(old || new), but its gradient on policy is that of the log-probability alone: noise of mean zero.
    """
    return old_log_probs - log_probs


def k3_estimate(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """``r - 1 - log r`` with ``r = pi / pi_old``: unbiased for KL(old || new), never negative, flat on policy."""
    log_ratio = log_probs - old_log_probs
    return torch.expm1(log_ratio) - log_ratio


@dataclass
class KlController:
    """Weight of the KL penalty: a linear warm-up, then proportional feedback.

    Attributes:
        minimum: weight at the start, and lower bound.
        maximum: weight at the end of the warm-up, and upper bound.
        warmup_updates: updates of the warm-up, K.
        target: desired KL.
        history: KL values averaged, H.
        direction: ``published`` (Eq. 42) lowers the weight when the KL is above the target; ``usual`` raises it.
        updates: updates seen.
        weight: of the next update.
        observed: the latest KL values.
    """

    minimum: float
    maximum: float
    warmup_updates: int
    target: float
    history: int
    direction: Literal["published", "usual"]
    updates: int = 0
    weight: float = field(default=-1.0)
    observed: deque[float] = field(default_factory=deque)

    TOLERANCE = 0.5
    GAIN = 0.1

    def __post_init__(self) -> None:
        if self.weight < 0:
            self.weight = self.minimum if self.warmup_updates > 0 else self.maximum

    def observe(self, kl: float) -> None:
        """Takes the KL of an update and sets the weight of the next one."""
        self.updates += 1
        self.observed.append(kl)
        while len(self.observed) > self.history:
            self.observed.popleft()
        if self.updates <= self.warmup_updates:
            self.weight = self.minimum + (self.maximum - self.minimum) * self.updates / self.warmup_updates
            return
        mean = sum(self.observed) / len(self.observed)
        sign = -1 if self.direction == "published" else 1
        if mean > (1 + self.TOLERANCE) * self.target:
            self.weight *= 1 + sign * self.GAIN
        elif mean < (1 - self.TOLERANCE) * self.target:
            self.weight *= 1 - sign * self.GAIN
        self.weight = min(max(self.weight, self.minimum), self.maximum)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        return {"updates": self.updates, "weight": self.weight, "observed": list(self.observed)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a state of :meth:`state`."""
        self.updates, self.weight = int(state["updates"]), float(state["weight"])
        self.observed = deque(state["observed"])
