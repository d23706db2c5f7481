"""The generator, its prompts, and how rollouts and evaluations sample from it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from euphonium.config.base import Node, NonNegativeFloat, NonNegativeInt, PassSize, PathOrHubId, Seed, Steps, UserPath

if TYPE_CHECKING:
    from torch import Tensor

    from euphonium.dynamics import Guidance, StepTable


class LoraConfig(Node):
    """Low-rank adapters: only they are trained, published and checkpointed (extra: lora)."""

    rank: PositiveInt = 32
    """Rank of the adapters."""
    alpha: PositiveFloat = 64.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Endings of the names of the linear layers that get an adapter."""


class ModelConfig(Node):
    """The generator, and the shape of its samples."""

    path: PathOrHubId
    """Folder or hub id of a diffusers pipeline."""
    revision: str | None = None
    """Commit of the hub repository; leave unset for a folder."""
    pipeline: str | None = None
    """Class of the pipeline where it is not the one in ``model_index.json``: ``WanImageToVideoPipeline`` begins the
    videos of Wan 2.2 TI2V with a picture."""
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
    cfg_scale: float | None = None
    """Classifier-free guidance, in rollout, training and evaluation alike: passes of twice the rows; None for none."""
    cfg_scale_2: float | None = None
    """Scale of the steps of low noise, for models with a second transformer for them; None for that of the others."""
    trained: Literal["both", "high_noise", "low_noise"] = "both"
    """Which transformers are trained of models that have one for high noise and one for low."""
    negative_prompt: str = ""
    """What classifier-free guidance steers away from."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory in the outcome-reward servers, a little slower."""
    vae_slicing: bool = False
    """Decode one sample of a batch at a time: less memory in the outcome-reward servers, a little slower."""
    attention_backend: str | None = None
    """Attention kernels of all roles, by the name that diffusers gives them, such as ``_native_cudnn``; null takes
    torch's choice."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""


class PromptsConfig(Node):
    """Files with one prompt a line (``.txt``), one JSON object with a ``prompt`` a line (``.jsonl``), or a JSON list of
    objects with a ``caption`` (``.json``).

    For image-to-video the object also has an ``image``: a file, relative to the prompts', that rollout actors read.
    What else it has reaches the rewards that ask for it (docs/prompts.md).
    """

    train: UserPath
    """Prompts that rollouts draw from."""
    evaluation: UserPath
    """Held-out prompts; a prompt that is also in ``train`` is refused."""
    embeddings: UserPath | None = None
    """Prompts that are encoded already: the folder that ``euphonium preprocess`` wrote, or DanceGRPO's
    ``videos2caption.json``. No role then loads a text encoder; null encodes prompts where they are drawn."""


class SpsaConfig(Node):
    """Zeroth-order gradient of the pixel reward (Eq. 52), which costs two decoded samples a perturbation."""

    perturbations: PositiveInt = 1
    """K, perturbations that are averaged."""
    scale: PositiveFloat = 0.01
    """Size of a perturbation."""


class GuidanceControlConfig(Node):
    """Guidance that follows what it earns: after each iteration the strength of all members is raised while the
    strongest guided members of a group do better than the next weaker ones, and lowered while they do worse.
    """

    raise_by: Annotated[float, Field(gt=1)] = 1.25
    """Factor of the strength after an iteration in which the strongest members did better."""
    lower_by: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Factor after one in which they did worse."""
    confidence: NonNegativeFloat = 1.0
    """Standard errors by which they must do better for the strength to be raised."""
    lowest: PositiveFloat = 0.1
    """Smallest strength, as a multiple of ``scale``; with none at all nothing could be measured any more."""
    highest: PositiveFloat = 1.0
    """Largest strength, as a multiple of ``scale``; with 1 the strength only falls and recovers. Samples gain from far
    stronger guidance than the policy does (docs/results.md)."""

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if not self.lowest <= 1 <= self.highest:
            raise ValueError(f"the strength starts at 1, which must lie in [{self.lowest}, {self.highest}]")
        return self


class GuidanceConfig(Node):
    """Reward-gradient guidance of the rollout (Euphonium, Eq. 12 and 20)."""

    source: Literal["prm", "spsa"] = "prm"
    """Where the gradient comes from: the process reward model, or an estimate from the outcome rewards."""
    scale: float | None = None
    """lambda: the drift gains lambda times the gradient. Give this or ``beta``."""
    beta: PositiveFloat | None = None
    """KL weight: the step gains V_k / (2 beta) times the gradient. Give this or ``scale``."""
    window: tuple[int, int] | None = None
    """Half-open range of guided steps; None guides every step."""
    time_window: tuple[float, float] | None = None
    """The same as a half-open range of t = 1 - sigma, from noise (0) to data (1), in which guided steps begin."""
    every: PositiveInt = 1
    """Guides every n-th step of the window, from its first on."""
    scale_per: Literal["time", "step"] = "time"
    """``time`` pushes by ``scale`` times the step's length (Eq. 20), ``step`` by ``scale`` at every step, however long
    (the released trainer without ``use_delta_t_for_gradient_scaling``)."""
    normalise: Literal[False, True, "noise"] = False
    """Scale every sample's gradient first: ``true`` to unit length; ``noise`` so that a scale of 1 pushes a step as far
    as its noise does, which means the same for every reward model and step (needs ``scale``)."""
    strengths: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1.0,)
    """Strengths of a group's members, in turn, as multiples of ``scale``: ``[0, 1]`` leaves every other member without
    guidance, so that each group shows what guidance earns."""
    until: PositiveInt | None = None
    """Iterations over which the strength falls linearly to zero; from then on nothing is guided. Null keeps it."""
    control: GuidanceControlConfig | None = None
    """Lets the strength follow what guidance earns; needs at least two different ``strengths``."""
    spsa: SpsaConfig = SpsaConfig()
    """Settings of the source ``spsa``."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        self.build()
        if self.normalise == "noise" and self.scale is None:
            raise ValueError(
                "normalise: noise measures the push in units of the noise by scale; beta does that already"
            )
        if self.normalise == "noise" and self.scale_per == "step":
            raise ValueError("normalise: noise already pushes all steps alike; leave scale_per out")
        return self

    @model_validator(mode="after")
    def _control_can_compare(self) -> Self:
        if self.control is not None and len(set(self.strengths)) == 1:
            raise ValueError(
                "control compares members that are guided differently: give sampler.guidance.strengths, for example "
                "[0, 1]"
            )
        return self

    def build(self) -> Guidance:
        """The guidance of a step table with these settings.

        Raises:
            StepTableError: both or neither of ``scale`` and ``beta``, or both windows.
        """
        from euphonium.dynamics import Guidance

        return Guidance(
            scale=self.scale, beta=self.beta, window=self.window, time_window=self.time_window, every=self.every,
            per_step=self.scale_per == "step",
        )  # fmt: skip

    def at(self, iteration: int) -> Guidance | None:
        """The guidance in an iteration (from 0); None once it has ended."""
        whole = self.build()
        left = 1.0 if self.until is None else max(0.0, 1 - iteration / self.until)
        if left == 0:
            return None
        if whole.beta is not None:
            return dataclasses.replace(whole, beta=whole.beta / left)
        assert whole.scale is not None
        return dataclasses.replace(whole, scale=whole.scale * left)


class MovingWindowConfig(Node):
    """A window of stochastic steps that changes with the iteration, or with the group."""

    kind: Literal["sliding", "random", "group"]
    """``sliding`` moves from noise to data and starts over (MixGRPO), ``random`` is drawn every iteration, ``group``
    for every group: all samples of a prompt are stochastic at the same steps (Flash-GRPO, with size 1)."""
    size: PositiveInt
    """Steps in the window."""
    allowed: tuple[int, int]
    """Half-open range of steps in which the window stays."""
    stride: PositiveInt = 1
    """Steps that a sliding window moves at a time."""
    every: PositiveInt = 1
    """Iterations that a sliding window stays in one place."""
    seed: Seed = 0
    """Seed of a window that is drawn."""


class NoiseGridConfig(Node):
    """The noise levels between which a sampler steps."""

    # Key of a recipe's section of these settings, for errors.
    section: ClassVar[str] = "sampler"

    grid: Literal["pipeline", "linear"] = "pipeline"
    """``pipeline`` walks the noise levels of the generator's own diffusers pipeline, as its scheduler computes them;
    ``linear`` evenly spaced ones under ``shift``. Left out, it is ``linear`` where ``shift`` is given."""
    shift: PositiveFloat | None = None
    """Time shift s of the noise levels (flow matching); null takes that of the pipeline's scheduler."""

    @model_validator(mode="before")
    @classmethod
    def _a_shift_alone_is_linear(cls, values: Any) -> Any:
        # A recipe that says how the grid is shifted means one that it knows, whichever model it is for.
        if isinstance(values, dict) and "grid" not in values and values.get("shift") is not None:
            return values | {"grid": "linear"}
        return values

    @model_validator(mode="after")
    def _linear_has_a_shift(self) -> Self:
        if self.grid == "linear" and self.shift is None:
            raise ValueError("grid: linear needs a shift; 1 leaves the noise levels evenly spaced")
        return self


class SamplerConfig(NoiseGridConfig):
    """The stochastic sampler of the rollouts, from noise to data."""

    law: Literal["dance", "flow_grpo", "flow_grpo_wan", "sage", "cps", "ddim", "ode"] = "dance"
    """Transition law of the stochastic sampler; ``flow_grpo_wan`` is that of Flow-GRPO's code for Wan, with ``eta: 1``;
    ``ddim`` is for models that predict the noise. ``ode`` has no noise, for objectives without transitions
    (``objective.kind: nft`` or ``dpo``)."""
    eta: PositiveFloat | None = None
    """Noise level; its meaning depends on the law (docs/methods.md). Every law but ``ode`` needs one."""
    num_steps: Steps
    """Sampling steps T."""
    shared_noise: bool = True
    """Whether the samples of a group start from the same noise; groups never share it."""
    sde_window: tuple[int, int] | MovingWindowConfig | None = None
    """Stochastic steps; the others are steps of the ODE and are not trained. Either a half-open range, where
    ``[0, T - 1]`` ends on the predicted data instead of on data plus noise, or a moving window. None makes every step
    stochastic."""
    guidance: GuidanceConfig | None = None
    """Reward-gradient guidance; None samples without."""

    def window(self, iteration: int) -> tuple[int, int] | None:
        """Half-open range of the steps that are stochastic in an iteration (from 0) for some group; None for all."""
        from euphonium.dynamics.windows import random_window, sliding_window

        moving = self.sde_window
        if not isinstance(moving, MovingWindowConfig):
            return moving
        if moving.kind == "group":
            return moving.allowed
        if moving.kind == "random":
            return random_window(iteration, size=moving.size, allowed=moving.allowed, seed=moving.seed)
        return sliding_window(
            iteration, size=moving.size, allowed=moving.allowed, stride=moving.stride, every=moving.every
        )

    def of_group(self, ordinal: int | None = None) -> SamplerConfig:
        """The sampler that draws a group, which has its own window if windows are drawn for every group.

        Its transitions are scored by the table of all groups, which has the same numbers at its stochastic steps.

        Args:
            ordinal: of the group; None for one whose window is in the middle of all places, for plans.
        """
        from euphonium.dynamics.windows import middle_window, random_window

        moving = self.sde_window
        if not isinstance(moving, MovingWindowConfig) or moving.kind != "group":
            return self
        if ordinal is None:
            window = middle_window(size=moving.size, allowed=moving.allowed)
        else:
            window = random_window(ordinal, size=moving.size, allowed=moving.allowed, seed=moving.seed)
        return self.model_copy(update={"sde_window": window})

    def table(self, sigmas: Tensor, iteration: int = 0, times: Tensor | None = None) -> StepTable:
        """The step table of these settings, for a flow-matching model.

        Args:
            sigmas: noise levels ``[num_steps + 1]``, which the generator knows
                (:meth:`euphonium.generators.generator.Generator.noise_grid`).
            iteration: from 0; moving windows and guidance that ends depend on it.
            times: the network's times, as for :meth:`euphonium.dynamics.StepTable.build`.

        Raises:
            StepTableError: settings that make a step undefined.
        """
        from euphonium.dynamics import StepTable

        return StepTable.build(
            self.law,
            sigmas,
            eta=self.eta,
            guidance=self.guidance.at(iteration) if self.guidance is not None else None,
            sde_window=self.window(iteration),
            times=times,
        )

    @model_validator(mode="after")
    def _noise_fits_the_law(self) -> Self:
        if self.law != "ode":
            if self.eta is None:
                raise ValueError(f"eta is missing: it is the noise level of law: {self.law} (docs/methods.md)")
        elif self.eta is not None or self.sde_window is not None:
            raise ValueError("law: ode has no noise: leave out eta and sde_window")
        elif self.shared_noise:
            raise ValueError(
                "law: ode makes all samples of a group the same if they start from the same noise; set "
                "shared_noise: false"
            )
        return self

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        # Impossible settings are refused here, before anything has been started, and not in a rollout actor. The
        # pipeline's grid is known together with the model, and so is DDIM's schedule: what depends on them is checked
        # there, and the rest here on evenly spaced levels.
        from euphonium.dynamics import shifted_sigmas

        moving = self.sde_window
        if isinstance(moving, MovingWindowConfig) and moving.allowed[1] > self.num_steps:
            raise ValueError(f"sde_window.allowed ends after the last of {self.num_steps} steps")
        self.of_group()
        if self.law == "ddim":
            self.window(0)
        else:
            shift = self.shift if self.grid == "linear" else None
            self.table(shifted_sigmas(self.num_steps, shift or 1.0))
        return self


class RolloutConfig(Node):
    """How many samples an iteration takes, and how far rollouts may run ahead of training."""

    prompts_per_iteration: PositiveInt
    """Groups an iteration, one a prompt."""
    group_size: Annotated[int, Field(ge=2)]
    """Samples of a group, G; advantages compare them."""
    samples_per_pass: PassSize = 16
    """Most samples in one forward pass of a rollout or an evaluation; a pass that does not fit is halved for good. From
    some thousand tokens on, more than one a pass gains nothing and costs memory. ``auto`` leaves it to the plan."""
    compile: bool = False
    """Compile the transformer's blocks in rollout actors: about 1.5 times as fast on an H100, after tens of seconds
    for the first pass of each shape."""
    reuse_below: PositiveFloat | None = None
    """Let steps without noise, which have no likelihood, go without the blocks behind the first one and add what these
    added at the step before, where the first block's own contribution has changed by less than this share (the
    first-block cache of diffusers; 0.05 to 0.2 are usual). Steps with noise are always computed in full. Samples change
    a little: docs/performance.md has how much. null computes every step."""
    deadline_s: PositiveFloat = 600.0
    """Longest time that one group may take before its actor counts as hung."""
    max_staleness: NonNegativeInt = 0
    """Iterations that rollouts may run ahead of the learner. 0 is strictly on-policy: the policy that a group trains is
    the one that drew it, and runs repeat exactly. With n, groups are drawn while up to n earlier iterations are still
    being trained."""
    stream: bool = True
    """With ``max_staleness`` 0, have the learner begin with an iteration's first groups while the others are drawn. The
    numbers are those of a learner that waits, to the last bit. Not with ``advantage.scope: global``, which needs all
    groups, nor where roles share GPUs, which take turns."""
    split_tail: bool = False
    """Where ``prompts_per_iteration`` is no multiple of ``pools.rollout.num_actors``, draw the groups of the last,
    incomplete wave in parts, by all actors. They are cut between passes of ``samples_per_pass``, or anywhere where one
    pass holds a whole group. All noise is the group's, so that its samples are the same; but passes and requests to
    reward servers are smaller, which may change the last bits, and with them what ``reuse_below`` decides. So it is off
    by default. How groups are cut follows from the recipe alone, whatever ``euphonium scale`` does: a run repeats.
    Needs ``max_staleness`` 0; with more, idle actors go on with the next iteration's groups."""
    buffer_mb: PositiveFloat = 2048.0
    """Trajectories that may be held before drawing ahead pauses; those of the next iteration are always drawn."""
    buffer_groups: PositiveInt | None = None
    """The same bound as a number of groups; null allows what ``max_staleness`` allows."""


class EvaluationConfig(Node):
    """Evaluation on held-out prompts: ODE sampling from fixed noise, outcome rewards, no process reward."""

    every: PositiveInt = 10
    """Iterations between evaluations; the first is before training, the last after it."""
    num_steps: Steps = 30
    """ODE steps."""
    prompts: PositiveInt = 16
    """Held-out prompts, spread evenly over the file."""
    samples_per_prompt: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Samples a prompt, each from noise of its own."""
    seed: Seed = 1_000_003
    """Seed of the noise; apart from the run's seed, so that runs compare on the same noise."""
    reuse_below: PositiveFloat | None = None
    """As ``rollout.reuse_below``, at the evaluation's steps. Scores of runs compare at equal values only."""
    clips: NonNegativeInt = 8
    """Clips saved as pictures in ``samples/``."""
