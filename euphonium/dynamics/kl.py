"""Estimates of the KL divergence between successive policies, and a KL penalty's adaptive weight (SAGE-GRPO, A.6)."""

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
    """Weight of the KL penalty: a linear warm-up, then proportional feedback if there is a target.

    Attributes:
        minimum: weight at the start of the warm-up, and lower bound.
        maximum: weight at the end of the warm-up, and upper bound.
        warmup_updates: K, updates of the warm-up.
        target: desired KL; a mean within half of it leaves the weight as it is. None has no feedback.
        history: H, the number of KL values that are averaged.
        direction: ``published`` (Eq. 42) lowers the weight when the KL is above the target; ``usual`` raises it.
        updates: updates observed so far.
        weight: weight of the next update.
        observed: the latest KL values, ``history`` at most.

    Example:
        >>> controller = KlController(
        ...     minimum=0.2, maximum=1.0, warmup_updates=2, target=1.0, history=1, direction="usual"
        ... )
        >>> weights = [controller.weight]
        >>> for kl in (1.0, 1.0, 1.2, 0.1, 9.0, 9.0):  # two of the warm-up, on target, too low, too high
        ...     controller.observe(kl)
        ...     weights.append(round(controller.weight, 2))
        >>> weights
        [0.2, 0.6, 1.0, 1.0, 0.9, 0.99, 1.0]
    """

    minimum: float
    maximum: float
    warmup_updates: int
    target: float | None
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
        """Records the KL of an update, and sets the weight of the next one."""
        self.updates += 1
        self.observed.append(kl)
        while len(self.observed) > self.history:
            self.observed.popleft()
        if self.updates <= self.warmup_updates:
            self.weight = self.minimum + (self.maximum - self.minimum) * self.updates / self.warmup_updates
            return
        if self.target is None:
            return
        mean = sum(self.observed) / len(self.observed)
        sign = -1 if self.direction == "published" else 1
        if mean > (1 + self.TOLERANCE) * self.target:
            self.weight *= 1 + sign * self.GAIN
        elif mean < (1 - self.TOLERANCE) * self.target:
            self.weight *= 1 - sign * self.GAIN
        self.weight = min(max(self.weight, self.minimum), self.maximum)

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores, as JSON values."""
        return {"updates": self.updates, "weight": self.weight, "observed": list(self.observed)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state that :meth:`state` returned."""
        self.updates, self.weight = int(state["updates"]), float(state["weight"])
        self.observed = deque(state["observed"])
