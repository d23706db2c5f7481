"""The objective and the optimiser of the policy, checkpoints and metrics."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from euphonium.config.base import Decay, Fraction, Node, NonNegativeFloat, NonNegativeInt

# Fields of the objective that say something of transitions or their likelihood.
OF_TRANSITIONS = (
    "imitate_guidance", "clip_range", "step_weights", "ratio_normalisation", "old_log_probs", "ratio_alarm",
    "ratio_tolerance", "ratio_tolerance_p99",
)  # fmt: skip


class KlControllerConfig(Node):
    """Weight of the KL penalty that changes: a linear warm-up, then feedback if there is a target (SAGE-GRPO, A.6)."""

    minimum: NonNegativeFloat = 1e-7
    """Weight at the start, and lower bound."""
    maximum: PositiveFloat = 1e-5
    """Weight at the end of the warm-up, and upper bound."""
    warmup_updates: NonNegativeInt = 100
    """K, updates of the linear warm-up."""
    target: PositiveFloat | None = None
    """Desired KL; feedback acts when the mean of the last ``history`` values is half as much off. Null has none: after
    the warm-up the weight stays at ``maximum``."""
    history: PositiveInt = 10
    """H, values averaged."""
    direction: Literal["published", "usual"] = "published"
    """``published`` lowers the weight when the KL is high, as the paper does; ``usual`` raises it."""


class KlConfig(Node):
    """Penalty ``weight * (anchor_weight KL(policy || anchor) + previous_weight KL(policy || previous))``."""

    weight: NonNegativeFloat = 1.0
    """lambda_KL; without a controller it stays."""
    controller: KlControllerConfig | None = None
    """Changes the weight from update to update; None keeps it."""
    anchor: Literal["none", "fixed", "moving"] = "none"
    """Reference of the position term: the policy before training, or one that follows it."""
    anchor_weight: NonNegativeFloat = 1.0
    """beta_pos."""
    refresh_every: PositiveInt = 10
    """N, updates after which a moving anchor takes over the policy."""
    previous: Literal["none", "log_ratio", "k3", "gaussian"] = "none"
    """Estimate of the velocity term, the divergence from the policy that drew the groups: the published mean
    log-ratio (Eq. 15), Schulman's k3, or the exact divergence of the transitions."""
    previous_weight: NonNegativeFloat = 1.0
    """beta_vel."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.anchor == "none" and self.previous == "none":
            raise ValueError("a KL penalty needs an anchor or a previous policy")
        return self


class NftConfig(Node):
    """DiffusionNFT: one loss draws the policy to good samples and away from bad ones."""

    mixture: PositiveFloat = 1.0
    """beta: share of the policy in the positive policy, against the old one; the negative is as far on the other side.
    Smaller values let the policy go further from the old one."""
    advantage_range: PositiveFloat = 5.0
    """Advantage from which on a sample is wholly good, and its negative wholly bad; between them it is both, in
    proportion. The loss is multiplied by it, so that small advantages count the same whatever the range."""


class ObjectiveConfig(Node):
    """The objective of the policy: a clipped surrogate, or a loss on noised samples; optionally with a KL penalty."""

    kind: Literal["distill", "standard", "nft", "dpo"] = "distill"
    """``distill`` scores guided samples under the unguided mean (Eq. 18-19), ``standard`` keeps the guidance. ``nft``
    (DiffusionNFT) and ``dpo`` (Diffusion-DPO on the best and the worst sample of each group) score no transitions: they
    noise the finished samples again, at noise levels of the sampler's grid (docs/methods.md). ``dpo`` takes its
    reference from ``kl.anchor`` and its beta from ``kl.weight``."""
    nft: NftConfig = NftConfig()
    """Settings of ``nft``."""
    imitate_guidance: NonNegativeFloat = 0.0
    """Weight of a regression of the policy's mean on the guided one, ``|mean - (mean + g grad)|^2 / (2 V)``, at the
    guided steps of guided members; only with ``distill``. The distilled surrogate follows a push as far as its sample's
    advantage says; this follows all of them, so it needs guidance that pays (``sampler.guidance.control``)."""
    clip_range: PositiveFloat = 1e-4
    """Clip range of the importance ratio (Eq. 17)."""
    timestep_fraction: Fraction = 1.0
    """Share of the stochastic steps that is trained, drawn at random for every sample (DanceGRPO's tau); with ``nft``
    and ``dpo`` share of all noise levels."""
    trained_steps: tuple[NonNegativeInt, PositiveInt] | None = None
    """Half-open range of the steps that are trained, of those with noise; the others keep theirs (DanceGRPO's ablation
    of first and last steps). Null trains at all; ``timestep_fraction`` is of this range."""
    trained_every: PositiveInt = 1
    """Trains every n-th of these steps, from the first on; the others keep their noise."""
    step_weights: Literal["uniform", "equaliser", "rectified", "inverse_delta"] = "uniform"
    """Weights of the steps in the loss: equal, SAGE-GRPO's temporal equaliser, Flash-GRPO's rectified ones (the same up
    to a factor: mean 1 instead of median 1), or one over the step's length."""
    ratio_normalisation: bool = False
    """Normalise the log-ratio by its drift and scale (GRPO-Guard); needs a copy of the previous policy."""
    old_log_probs: Literal["auto", "learner", "rollout"] = "auto"
    """Who computes the log-probabilities that ratios divide by. ``learner``: the first update of an on-policy group
    takes the learner's own, so that every ratio is exactly 1 at no cost; later updates recompute them before the first
    one. ``rollout``: the rollout actors', which in bfloat16 differ from the learner's by more than a tight clip range.
    ``auto``: the learner's, but in float32 later updates take the rollout's, which are equal there but for rounding.
    Groups of an earlier policy always have the rollout's."""
    kl: KlConfig | None = None
    """KL penalty; None for none."""
    updates_per_iteration: PositiveInt = 1
    """Optimiser steps an iteration; the groups are split evenly among them."""
    ratio_alarm: PositiveFloat = 3e-4
    """Mean |ratio - 1| between the learner's and the rollout's log-probabilities of on-policy groups, before the first
    update, above which there is a warning."""
    ratio_tolerance: PositiveFloat = 2e-3
    """The same mean, above which the run stops before the weights move: rollout and learner disagree."""
    ratio_tolerance_p99: PositiveFloat = 1e-2
    """Limit on |ratio - 1| that 99 % of the transitions must keep, likewise."""

    @model_validator(mode="after")
    def _trains_some_steps(self) -> Self:
        if self.trained_steps is not None and self.trained_steps[0] >= self.trained_steps[1]:
            raise ValueError(
                f"trained_steps {list(self.trained_steps)} is empty; it ends before the step after its last"
            )
        return self

    @model_validator(mode="after")
    def _imitates_what_is_not_in_the_mean(self) -> Self:
        if self.imitate_guidance and self.kind == "standard":
            raise ValueError("imitate_guidance needs kind: distill; with standard the guidance is in the mean already")
        return self

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind != "nft" and self.nft != NftConfig():
            raise ValueError("the fields of nft are for kind: nft")
        if not self.noises_samples:
            return self
        foreign = [name for name in OF_TRANSITIONS if getattr(self, name) != type(self).model_fields[name].default]
        if foreign:
            raise ValueError(
                f"kind: {self.kind} trains on noised samples, which have no importance ratio and no guidance: leave "
                f"out {', '.join(foreign)}"
            )
        if self.kl is not None and self.kl.previous != "none":
            raise ValueError(f"kind: {self.kind} has no transitions to estimate kl.previous from; take kl.anchor")
        if self.kind == "dpo" and (self.kl is None or self.kl.anchor == "none" or not self.has_penalty):
            raise ValueError(
                "dpo measures from a reference: give kl.anchor, fixed or moving, and its beta, a kl.weight above 0"
            )
        return self

    @property
    def noises_samples(self) -> bool:
        """Whether the policy is trained on finished samples that are noised again, instead of on transitions."""
        return self.kind in ("nft", "dpo")

    @property
    def has_penalty(self) -> bool:
        """Whether the divergence from other policies has a weight."""
        return self.kl is not None and (self.kl.weight > 0 or self.kl.controller is not None)

    @property
    def trains_zero_advantages(self) -> bool:
        """Whether rows are computed even where their advantage is 0.

        They have a gradient by a KL penalty, by imitation, or where NFT's policy has left the old one; and DPO's pairs
        stay whole.
        """
        left = self.kind == "nft" and self.needs_previous_policy
        return self.imitate_guidance > 0 or self.has_penalty or left

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradients that guided a step travel to the learner."""
        return self.kind == "standard" or self.imitate_guidance > 0

    @property
    def compares_means(self) -> bool:
        """Whether means of transitions under the policy that drew them are needed, not only log-probabilities."""
        return self.ratio_normalisation or (self.kl is not None and self.kl.previous == "gaussian")

    @property
    def needs_previous_policy(self) -> bool:
        """Whether the policy that an iteration begins with must be kept, because its outputs are needed later.

        NFT's old policy is that. In the iteration's first update it is the policy itself, whose outputs are at hand.
        """
        return self.updates_per_iteration > 1 and (self.compares_means or self.kind == "nft")


class OptimizerConfig(Node):
    """AdamW and its learning-rate schedule."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from the peak to zero over the run."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the rate rises linearly to its peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Decay = 0.0
    """Decay of the moving average of the weights that evaluation and export use; 0 uses the policy itself."""

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.ema_decay > 0


class CheckpointConfig(Node):
    """When checkpoints are written and how many are kept."""

    every: PositiveInt = 10
    """Iterations between checkpoints; one more is written at the end and on SIGTERM."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints of iterations that this divides are kept for good; null keeps only the newest."""


class ProfileConfig(Node):
    """Traces of what every process does, and rates at which it computes."""

    iterations: tuple[PositiveInt, ...] = ()
    """Iterations in each of which every process traces one unit of its work into the run's ``traces/``: a rollout actor
    a group, a rank of the learner a micro-batch, a reward server a pass."""
    operations: bool = False
    """Record the operations a second that rollout actors and learner ranks achieve. They are counted at the start, on a
    thread of the driver, which takes up to a minute for the largest models."""


class TrackerConfig(Node):
    """A service that metrics and clips are sent to; accounts and keys are its library's own affair."""

    kind: Literal["wandb", "mlflow", "swanlab"]
    """Weights & Biases, MLflow or SwanLab; each is an extra of this package."""
    project: str = "euphonium"
    """Project, or experiment, that the run appears in."""
    uri: str | None = None
    """Address of a server of one's own (W&B, MLflow); null takes what the library's environment says."""
    offline: bool = False
    """Keep everything in the run's folder, to be sent later; needs no network."""
    clips: bool = True
    """Send the clips of evaluations, too."""


class MetricsConfig(Node):
    """Where metrics are published, besides ``metrics.jsonl``."""

    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = 0
    """Port of the Prometheus endpoint; 0 takes a free one, null serves none."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint binds to."""
    tensorboard: bool = True
    """Write TensorBoard event files to ``events/``."""
    trackers: list[TrackerConfig] = Field(default_factory=list)
    """Services that metrics and clips are sent to. One that fails is warned of, and never stops a run."""
