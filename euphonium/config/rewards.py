"""Outcome and process rewards, their servers' failures, and how rewards become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from euphonium.config.base import Node, NonNegativeFloat, PassSize, PathOrHubId

OnFailure = Literal["drop_group", "abort"]
# Name of the process reward of finished samples, among the outcome rewards.
FINAL_PROCESS = "final_process"


class OutcomeRewardConfig(Node):
    """One outcome reward, which scores finished samples."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=80)]
    """Name in metrics and logs."""
    type: str
    """Short name of a built-in reward (docs/rewards.md), or ``package.module:Class`` of your own."""
    weight: float = 1.0
    """Weight of its normalised advantage; 0 reports it without training on it: its failures cost no group."""
    threshold: float | None = None
    """Train on 1 above this value and 0 elsewhere, instead of on the value (binary rewards)."""
    options: dict[str, object] = Field(default_factory=dict)
    """Options of the reward: those of a built-in one are listed below, those of your own are its own."""
    on_failure: OnFailure = "drop_group"
    """What happens when this reward cannot be had for a group, after all attempts: leave the group out and count it,
    or stop the run with an error."""


def optional_rewards(rewards: Sequence[OutcomeRewardConfig]) -> tuple[str, ...]:
    """Names of the rewards that nothing is trained on, and that are not to end a run when they fail."""
    return tuple(r.name for r in rewards if r.weight == 0 and r.on_failure == "drop_group")


class PrmRefreshConfig(Node):
    """Training of the process reward model during a run, on the policy's own samples."""

    every: PositiveInt = 8
    """Iterations between refreshes."""
    updates: PositiveInt = 300
    """Optimiser steps of a refresh, which begins at the weights of the start."""
    pairs_per_update: PositiveInt = 32
    """Pairs in a batch."""
    pairs_per_micro_batch: PassSize | None = None
    """Pairs in one forward and backward pass; null takes them all at once, ``auto`` leaves it to the plan. Every pair
    is two samples."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    learning_rate: PositiveFloat = 1e-4
    """Peak rate of AdamW; rises linearly over the first twentieth, then falls to zero along a cosine."""
    buffer_groups: PositiveInt = 256
    """Newest groups that pairs are drawn from; their latents lie in the actor's memory and in every checkpoint."""
    margin: NonNegativeFloat = 0.0
    """Samples whose weighted outcome rewards differ by less make no pair; best as in the model's own training."""


class ProcessRewardConfig(Node):
    """The process reward model, which scores noisy states."""

    path: PathOrHubId
    """Folder of a trained process reward model."""
    weight: float = 1.0
    """Weight of the process advantage; 0 keeps the gradient guidance alone."""
    outcome_weight: float = 0.0
    """Weight of the process reward of the finished samples as one more outcome reward, normalised on its own like the
    others (the released trainer's ``LATENT_REWARD_IN_TRL_REWARD_COEF``); it is called ``final_process``."""
    steps: Literal["all", "guided"] = "all"
    """Steps with a process reward: every one with noise, or of these the guided ones (Euphonium's released script)."""
    refresh: PrmRefreshConfig | None = None
    """Trains the model again in a run, on the policy's own samples, ranked by the outcome rewards; null never does."""
    credit: Literal["state", "next_state", "progress"] = "state"
    """Whether action k is credited with the reward of the state it leaves (papers), of the one it leads to, or with
    the difference. The state that it leaves does not depend on the action: without guidance that credit is noise."""
    on_failure: OnFailure = "drop_group"
    """The same as ``rewards.outcome[].on_failure``, for the process reward and its gradient."""


class BreakerConfig(Node):
    """When a failing reward server is skipped for a while (a circuit breaker)."""

    failures: PositiveInt = 3
    """Failures in a row after which a server is skipped."""
    cool_down_s: PositiveFloat = 10.0
    """How long it is skipped; then one request probes it, and its answer decides."""


class WatchConfig(Node):
    """Watch for reward hacking: a policy whose samples the process reward model ranks no better than guessing."""

    window: PositiveInt = 10
    """Iterations over which the pairwise accuracy of the process reward on the policy's own samples is averaged."""
    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.55
    """Below this average a warning is printed and the metric ``watch/alarm`` is 1; guessing is right in 0.5 of the
    pairs. 0 never warns."""


class RewardsConfig(Node):
    """All rewards of a run, and what happens when one cannot be had."""

    outcome: Annotated[list[OutcomeRewardConfig], Field(min_length=1)]
    """Outcome rewards; each is normalised on its own over its group, then weighted and added."""
    process: ProcessRewardConfig | None = None
    """Process reward model; needed for guidance by it and for process advantages."""
    deadline_s: PositiveFloat = 60.0
    """Longest wait for one answer of a reward server."""
    attempts: PositiveInt = 3
    """How often a request is tried, each time with another server if there is one, before its group is dropped."""
    breaker: BreakerConfig = BreakerConfig()
    """Servers that fail in a row are skipped for a while."""
    watch: WatchConfig = WatchConfig()
    """Warning when the process reward no longer orders the policy's samples as the outcome rewards do."""
    max_dropped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of an iteration's groups that may be dropped before the run stops with an error."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the outcome rewards without which a group can be trained on."""
        return optional_rewards(self.outcome)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [reward.name for reward in self.outcome]
        for name in names:
            if names.count(name) > 1 or name in ("total", "process", FINAL_PROCESS):
                raise ValueError(f"outcome reward name {name!r} is taken; names must differ from each other")
        return self


class AdvantageConfig(Node):
    """Normalisation of rewards into advantages (Euphonium, Eq. 16)."""

    mode: Literal["both", "process", "outcome"] = "both"
    """Rewards that enter the advantage; the others are only reported."""
    scope: Literal["group", "global"] = "group"
    """Divide by the spread within the group, or over all groups of the iteration (Flow-GRPO's code)."""
    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the standard deviation."""
    eps: PositiveFloat = 1e-8
    """Added to the standard deviation; a group whose spread does not exceed it gets advantage 0."""
    clip: PositiveFloat = 5.0
    """Advantages are clipped to this absolute value."""
    baseline: Literal["group", "strength", "unguided"] = "group"
    """Whom a sample is compared with: its whole group, the members of its group that were guided as strongly
    (``sampler.guidance.strengths``), or those without guidance, which draw as the policy itself does: what guided
    members do better is then learnt from them, and nothing is unlearnt for it."""
    combine: Literal["advantages", "losses"] = "advantages"
    """Add the rewards' advantages (paper), or clip and add a loss for each (Euphonium's released script)."""
    best_of: PositiveInt | None = None
    """Train on this many best and as many worst samples of each group (DanceGRPO's best-of-N); None trains on all."""
