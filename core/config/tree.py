"""The configuration tree of a run. Every default of the application is here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

if TYPE_CHECKING:
    from dynamics import StepTable

NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Node(BaseModel):
    """Base of all parts of the tree: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Node):
    """The generator and the shape of what it generates."""

    path: str
    """Folder or hub id of a diffusers pipeline."""
    revision: str | None = None
    """Commit of the hub repository; leave unset for a folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the transformer's weights in rollout and learner."""
    frames: PositiveInt = 1
    """Frames of a sample; 1 for images."""
    height: PositiveInt
    """Pixels."""
    width: PositiveInt
    """Pixels."""
    max_prompt_tokens: PositiveInt = 256
    """Prompts are cut to this many tokens."""
    embedded_guidance: float | None = None
    """Guidance scale that guidance-distilled models take as an input; None for models without."""


class PromptsConfig(Node):
    """Files with one prompt a line (``.txt``) or one JSON object with a ``prompt`` a line (``.jsonl``)."""

    train: Path
    """Prompts that rollouts draw from."""
    evaluation: Path
    """Held-out prompts; a prompt that is also in ``train`` is refused."""


class GuidanceConfig(Node):
    """Reward-gradient guidance of the rollout (Euphonium, Eq. 12 and 20)."""

    scale: float | None = None
    """lambda: the drift gains lambda times the gradient of the process reward. Give this or ``beta``."""
    beta: PositiveFloat | None = None
    """KL weight: the step gains V_k / (2 beta) times the gradient. Give this or ``scale``."""
    window: tuple[int, int] | None = None
    """Half-open range of guided steps; None guides every step."""

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if (self.scale is None) == (self.beta is None):
            raise ValueError("give exactly one of scale (lambda) and beta")
        return self


class SamplerConfig(Node):
    """How rollouts walk from noise to data."""

    law: Literal["dance", "flow_grpo", "sage", "cps"] = "dance"
    """Transition law of the stochastic sampler."""
    eta: PositiveFloat
    """Noise level; its meaning depends on the law (docs/methods.md)."""
    num_steps: PositiveInt
    """Sampling steps T."""
    shift: PositiveFloat = 1.0
    """Time shift s of the noise schedule."""
    shared_noise: bool = True
    """Whether the samples of a group start from the same noise; groups never share it."""
    sde_window: tuple[int, int] | None = None
    """Half-open range of stochastic steps; the others are steps of the ODE and are not trained. ``[0, T - 1]`` ends on
    the predicted data instead of on data plus noise. None makes every step stochastic."""
    guidance: GuidanceConfig | None = None
    """Reward-gradient guidance; None samples without."""

    def table(self) -> StepTable:
        """The step table of these settings.

        Raises:
            StepTableError: settings that make a step undefined.
        """
        from dynamics import Guidance, StepTable, shifted_sigmas

        return StepTable.build(
            self.law,
            shifted_sigmas(self.num_steps, self.shift),
            eta=self.eta,
            guidance=Guidance(**self.guidance.model_dump()) if self.guidance is not None else None,
            sde_window=self.sde_window,
        )


class RolloutConfig(Node):
    """How much is drawn for one iteration."""

    prompts_per_iteration: PositiveInt
    """Groups an iteration, one a prompt."""
    group_size: Annotated[int, Field(ge=2)]
    """Samples of a group, G."""
    deadline_s: PositiveFloat = 600.0
    """Longest time that one group may take before its actor counts as hung."""


class OutcomeRewardConfig(Node):
    """One outcome reward of finished samples."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in metrics and logs."""
    type: str
    """Short name of a built-in reward (docs/rewards.md), or ``package.module:Class`` of your own."""
    weight: float = 1.0
    """Weight of its normalised advantage; 0 reports it without training on it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward's constructor."""


class ProcessRewardConfig(Node):
    """The process reward model, which scores noisy states."""

    path: str
    """Folder of a trained process reward model."""
    weight: float = 1.0
    """Weight of the process advantage; 0 keeps the gradient guidance alone."""


class RewardsConfig(Node):
    """All rewards of a run, and what happens when one fails."""

    outcome: Annotated[list[OutcomeRewardConfig], Field(min_length=1)]
    """Outcome rewards; each is normalised on its own over its group, then weighted and added."""
    process: ProcessRewardConfig | None = None
    """Process reward model; needed for guidance and for process advantages."""
    deadline_s: PositiveFloat = 60.0
    """Longest wait for one answer of a reward server."""
    attempts: PositiveInt = 3
    """How often a request is tried before its group is dropped."""
    max_dropped_fraction: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of an iteration's groups that may be dropped before the run stops with an error."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [reward.name for reward in self.outcome]
        for name in names:
            if names.count(name) > 1 or name in ("total", "process"):
                raise ValueError(f"outcome reward name {name!r} is taken; names must differ from each other")
        return self


class AdvantageConfig(Node):
    """Normalisation of rewards into advantages (Euphonium, Eq. 16)."""

    ddof: Literal[0, 1] = 1
    """Delta degrees of freedom of the standard deviation."""
    eps: PositiveFloat = 1e-8
    """Added to the standard deviation; a group whose spread does not exceed it gets advantage 0."""
    clip: PositiveFloat = 5.0
    """Advantages are clipped to this absolute value."""


class ObjectiveConfig(Node):
    """What the learner optimises."""

    kind: Literal["distill", "standard"] = "distill"
    """``distill`` scores guided samples under the unguided mean (Eq. 18-19), ``standard`` keeps the guidance."""
    clip_range: PositiveFloat = 1e-4
    """Clip range of the importance ratio (Eq. 17)."""
    timestep_fraction: Fraction = 1.0
    """Share of the stochastic steps that is trained, drawn at random for every sample (DanceGRPO's tau)."""
    updates_per_iteration: PositiveInt = 1
    """Optimiser steps an iteration; the groups are split evenly among them."""
    ratio_tolerance: PositiveFloat = 1e-3
    """Largest |ratio - 1| of the first update before the run stops: rollout and learner disagree."""


class OptimizerConfig(Node):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from the peak to zero over the run."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the rate rises linearly to its peak."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights that evaluation and export use; 0 uses the policy itself."""


class EvaluationConfig(Node):
    """Evaluation on held-out prompts: ODE sampling from fixed noise, outcome rewards, no process reward."""

    every: PositiveInt = 10
    """Iterations between evaluations; the first is before training, the last after it."""
    num_steps: PositiveInt = 30
    """ODE steps."""
    prompts: PositiveInt = 16
    """Held-out prompts, spread evenly over the file."""
    samples_per_prompt: PositiveInt = 1
    """Samples a prompt, each from noise of its own."""
    seed: int = 1_000_003
    """Of the noise; apart from the run's seed, so that runs compare on the same noise."""
    clips: Annotated[int, Field(ge=0)] = 8
    """Clips saved as pictures in ``samples/``."""


class PoolConfig(Node):
    """Size of a pool of actors and what each of them takes."""

    num_actors: PositiveInt = 1
    """Actors in the pool."""
    num_cpus: NonNegativeFloat = 1.0
    """CPUs an actor reserves."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs an actor reserves; may be a fraction."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources an actor reserves, for example ``{rollout: 1}``."""
    threads: PositiveInt = 1
    """CPU threads of the actor's tensor operations."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """How often Ray may restart a dead actor."""


class LearnerPoolConfig(Node):
    """Size of the learner group and what each worker takes."""

    num_workers: PositiveInt = 1
    """ZeRO-3 ranks."""
    num_cpus: NonNegativeFloat = 1.0
    """CPUs a worker reserves."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs a worker reserves (0 or 1)."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom Ray resources a worker reserves, for example ``{learner: 1}``."""
    threads: PositiveInt = 1
    """CPU threads of a worker's tensor operations."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often the group may be restarted from the latest checkpoint."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for the group to start."""
    update_timeout_s: PositiveFloat = 1800.0
    """Longest time that the updates of one iteration may take."""
    rows_per_micro_batch: PositiveInt = 16
    """Transitions (sample, step) in one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    persistence_threshold: Annotated[int, Field(ge=0)] = 10_000
    """ZeRO-3 keeps parameters of fewer elements whole on every rank."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""
    weight_bucket_mb: PositiveFloat = 256.0
    """Size of the pieces in which weights are gathered and published."""


class PoolsConfig(Node):
    """The pools; their sizes are independent of each other."""

    rollout: PoolConfig = PoolConfig()
    """Rollout actors, on generator GPUs."""
    prm: PoolConfig = PoolConfig()
    """Process-reward servers, which answer with reward and gradient."""
    orm: PoolConfig = PoolConfig()
    """Outcome-reward servers, which decode latents and score the videos."""
    learner: LearnerPoolConfig = LearnerPoolConfig()
    """The ZeRO-3 learner group."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for all actors to be ready."""


class CheckpointConfig(Node):
    """When checkpoints are written and how many are kept."""

    every: PositiveInt = 10
    """Iterations between checkpoints; one more is written at the end and on SIGTERM."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""


class MetricsConfig(Node):
    """Where the numbers of a run go, besides ``metrics.jsonl``."""

    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = 0
    """Port of the Prometheus endpoint; 0 takes a free one, null serves none."""
    prometheus_host: str = "127.0.0.1"
    """Address that the endpoint binds to."""
    tensorboard: bool = True
    """Write TensorBoard event files to ``events/``."""


class PairsConfig(Node):
    """Preference pairs drawn from the generator itself and ranked by the outcome rewards."""

    samples_per_prompt: Annotated[int, Field(ge=2)] = 24
    """Samples of every training prompt."""
    held_out_samples_per_prompt: Annotated[int, Field(ge=2)] = 16
    """Samples of every held-out prompt, for the accuracy."""
    num_steps: PositiveInt = 10
    """ODE steps of the samples."""
    shift: PositiveFloat = 3.0
    """Time shift of the samples."""
    margin: NonNegativeFloat = 0.1
    """Pairs whose weighted outcome rewards differ by less are left out: their order is mostly noise."""


class PrmOptimizerConfig(Node):
    """Training of a process reward model."""

    updates: PositiveInt
    """Optimiser steps."""
    pairs_per_update: PositiveInt = 32
    """Pairs in a batch."""
    learning_rate: PositiveFloat = 3e-4
    """Peak rate; rises linearly over the first twentieth, then falls to zero along a cosine."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Decay of the moving average of the weights, which is what is saved."""
    evaluate_every: PositiveInt = 500
    """Updates between measurements of the held-out accuracy."""


class PrmConfig(Node):
    """Training of a process reward model from preferences (Euphonium, section 4.2)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    """Name of the training and of its folder."""
    output_dir: Path = Path("runs")
    """Where its folder is made."""
    seed: int = 0
    """Of samples, pairs and noise."""
    target: Path
    """Folder that the trained model is written to."""
    blocks: PositiveInt = 8
    """Blocks of the generator's transformer that make the trunk, counted from its input."""
    threads: PositiveInt = 1
    """CPU threads."""

    model: ModelConfig
    prompts: PromptsConfig
    outcome: Annotated[list[OutcomeRewardConfig], Field(min_length=1)]
    """Outcome rewards whose weighted sum ranks the samples."""
    pairs: PairsConfig = PairsConfig()
    optimizer: PrmOptimizerConfig

    @property
    def run_dir(self) -> Path:
        """Folder of this training."""
        return self.output_dir / self.name


class RunConfig(Node):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    """Name of the run and of its folder."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    seed: int = 0
    """Of prompts' order, noise and timestep selection."""
    iterations: PositiveInt
    """RL iterations."""
    resume: Literal["auto", "never"] | Path = "auto"
    """``auto`` goes on from the run's newest good checkpoint, ``never`` refuses to touch an old run's folder
    (it is moved aside), a path starts from that checkpoint."""

    model: ModelConfig
    prompts: PromptsConfig
    sampler: SamplerConfig
    rollout: RolloutConfig
    rewards: RewardsConfig
    advantage: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    pools: PoolsConfig = PoolsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @field_validator("sampler")
    @classmethod
    def _sampler_is_possible(cls, sampler: SamplerConfig) -> SamplerConfig:
        # Refused here, while nothing has been started, rather than in a rollout actor.
        sampler.table()
        return sampler

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sampler.guidance is not None and self.rewards.process is None:
            raise ValueError("sampler.guidance needs a process reward model: set rewards.process.path")
        if self.objective.updates_per_iteration > self.rollout.prompts_per_iteration:
            raise ValueError(
                f"objective.updates_per_iteration ({self.objective.updates_per_iteration}) exceeds "
                f"rollout.prompts_per_iteration ({self.rollout.prompts_per_iteration}): an update would have no group"
            )
        weights = [reward.weight for reward in self.rewards.outcome]
        weights.append(self.rewards.process.weight if self.rewards.process else 0.0)
        if not any(weights):
            raise ValueError("all reward weights are 0: there would be nothing to learn from")
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.name
