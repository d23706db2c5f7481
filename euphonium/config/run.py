"""The configuration of a training run, and the checks that concern several of its sections."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from euphonium.config.base import Name, Node, Planned, Seed, UserPath
from euphonium.config.pools import PoolsConfig
from euphonium.config.rewards import FINAL_PROCESS, AdvantageConfig, RewardsConfig
from euphonium.config.sampling import (
    EvaluationConfig,
    ModelConfig,
    MovingWindowConfig,
    PromptsConfig,
    RolloutConfig,
    SamplerConfig,
)
from euphonium.config.training import CheckpointConfig, MetricsConfig, ObjectiveConfig, OptimizerConfig, ProfileConfig

if TYPE_CHECKING:
    from euphonium.dynamics import AdvantageRule


class RunConfig(Node):
    """A training run: the root of a recipe of ``euphonium train``."""

    name: Name
    """Name of the run and of its folder."""
    output_dir: UserPath = Path("runs")
    """Where run folders are made."""
    seed: Seed = 0
    """Seed of the prompts' order, of noise and of the choice of trained steps."""
    iterations: PositiveInt
    """RL iterations."""
    resume: Literal["auto", "never"] | UserPath = "auto"
    """``auto`` goes on from the run's newest good checkpoint, ``never`` refuses to touch an old run's folder
    (it is moved aside), a path starts from that checkpoint."""
    start_from: UserPath | None = None
    """Weights that a new run's policy starts from in place of the model's own: the folder of another run's checkpoint,
    without its optimizer, or with ``model.lora`` also a LoRA that diffusers wrote."""

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
    profile: ProfileConfig = ProfileConfig()
    planned: Planned = Field(default_factory=dict)
    """What the plan chose where the recipe says ``auto``; a run writes it into its own recipe."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _guidance_has_its_process_reward(self.sampler, self.rewards)
        _every_update_has_a_group(self.objective, self.rollout)
        _some_reward_is_trained(self.advantage, self.rewards)
        _learner_still_has_the_old_policy(self.objective, self.rollout)
        _sleep_comes_in_turn(self.pools, self.rollout)
        _tail_has_idle_actors(self.rollout)
        _reuse_has_steps_and_blocks(self.sampler, self.rollout, self.evaluation)
        _best_of_fits_the_group(self.advantage, self.rollout)
        _members_of_each_strength_compare(self.sampler, self.advantage, self.rollout)
        _outcome_rewards_rank(self)
        _trained_steps_exist(self.objective, self.sampler)
        _objective_fits_the_samples(self)
        return self

    def advantage_rule(self) -> AdvantageRule:
        """The rule by which rewards become advantages, from the sections ``advantage`` and ``rewards``."""
        from euphonium.dynamics import AdvantageRule

        settings, process = self.advantage, self.rewards.process
        outcome = settings.mode != "process"
        weights = {reward.name: reward.weight if outcome else 0.0 for reward in self.rewards.outcome}
        if process is not None and self.scores_final_states:
            weights[FINAL_PROCESS] = process.outcome_weight
        return AdvantageRule(
            weights=weights,
            process_weight=process.weight if process is not None and settings.mode != "outcome" else 0.0,
            scope=settings.scope,
            ddof=settings.ddof,
            eps=settings.eps,
            clip=settings.clip,
            combine=settings.combine,
            thresholds={r.name: r.threshold for r in self.rewards.outcome if r.threshold is not None},
            best_of=settings.best_of,
        )

    @property
    def waits_for_all_groups(self) -> str:
        """Why the learner does not begin with an iteration's first groups while others are drawn; empty if it does."""
        rollout, pools = self.rollout, self.pools
        reasons = {
            "rollout.stream is false": not rollout.stream,
            "with rollout.max_staleness above 0 drawing and learning overlap already": rollout.max_staleness > 0,
            "advantage.scope: global compares the groups of a whole iteration": self.advantage.scope == "global",
            "roles that share GPUs take turns": pools.rollout.sleep or 0 < pools.learner.num_gpus < 1,
            "there is one group an iteration": rollout.prompts_per_iteration == 1,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    @property
    def scores_final_states(self) -> bool:
        """Whether the process rewards of finished samples count as an outcome reward."""
        process = self.rewards.process
        return process is not None and process.outcome_weight != 0 and self.advantage.mode != "process"

    @property
    def reuse_fields(self) -> list[str]:
        """Fields that let passes reuse what the last one computed."""
        thresholds = {"rollout": self.rollout.reuse_below, "evaluation": self.evaluation.reuse_below}
        return [f"{section}.reuse_below" for section, threshold in thresholds.items() if threshold is not None]

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.name


def _guidance_has_its_process_reward(sampler: SamplerConfig, rewards: RewardsConfig) -> None:
    guidance, process = sampler.guidance, rewards.process
    if guidance is not None and guidance.source == "prm" and process is None:
        raise ValueError("sampler.guidance needs a process reward model: set rewards.process.path")
    if process is not None and process.steps == "guided" and guidance is None:
        raise ValueError("rewards.process.steps: guided needs sampler.guidance")


def _every_update_has_a_group(objective: ObjectiveConfig, rollout: RolloutConfig) -> None:
    if objective.updates_per_iteration > rollout.prompts_per_iteration:
        raise ValueError(
            f"objective.updates_per_iteration ({objective.updates_per_iteration}) exceeds "
            f"rollout.prompts_per_iteration ({rollout.prompts_per_iteration}): an update would have no group"
        )


def _outcome_weights(advantage: AdvantageConfig, rewards: RewardsConfig) -> list[float]:
    if advantage.mode == "process":
        return []
    final = 0.0 if rewards.process is None else rewards.process.outcome_weight
    return [final, *(reward.weight for reward in rewards.outcome)]


def _some_reward_is_trained(advantage: AdvantageConfig, rewards: RewardsConfig) -> None:
    weights = _outcome_weights(advantage, rewards)
    if advantage.mode != "outcome" and rewards.process is not None:
        weights.append(rewards.process.weight)
    if not any(weights):
        raise ValueError(
            "all rewards that advantage.mode lets in have weight 0: nothing to learn from; give one a weight"
        )


def _learner_still_has_the_old_policy(objective: ObjectiveConfig, rollout: RolloutConfig) -> None:
    if rollout.max_staleness > 0 and (objective.compares_means or objective.needs_previous_policy):
        raise ValueError(
            "rollout.max_staleness above 0 trains on groups of earlier policies, which the learner no longer has: "
            "it goes without objective.ratio_normalisation, without objective.kl.previous: gaussian, and with "
            "objective.kind: nft only with one update an iteration"
        )


def _sleep_comes_in_turn(pools: PoolsConfig, rollout: RolloutConfig) -> None:
    if pools.rollout.sleep and rollout.max_staleness > 0:
        raise ValueError(
            f"pools.rollout.sleep leaves the GPUs to the learner while it works, and rollout.max_staleness "
            f"({rollout.max_staleness}) has rollouts go on meanwhile: set it to 0, or sleep to false"
        )


def _tail_has_idle_actors(rollout: RolloutConfig) -> None:
    if rollout.split_tail and rollout.max_staleness > 0:
        raise ValueError(
            f"rollout.split_tail has actors that would be idle share an iteration's last groups, and with "
            f"rollout.max_staleness ({rollout.max_staleness}) they go on with the next iteration's: set either to "
            "false or 0"
        )


def _reuse_has_steps_and_blocks(sampler: SamplerConfig, rollout: RolloutConfig, evaluation: EvaluationConfig) -> None:
    if rollout.reuse_below is not None and sampler.law != "ode" and sampler.sde_window is None:
        raise ValueError(
            "rollout.reuse_below is for steps without noise, and there are none: set sampler.sde_window, or leave it "
            "out"
        )
    if rollout.compile and (rollout.reuse_below is not None or evaluation.reuse_below is not None):
        raise ValueError("reuse_below decides at every pass which blocks are computed: it goes without rollout.compile")


def _best_of_fits_the_group(advantage: AdvantageConfig, rollout: RolloutConfig) -> None:
    best_of = advantage.best_of
    if best_of is not None and 2 * best_of > rollout.group_size:
        raise ValueError(f"advantage.best_of takes {2 * best_of} of {rollout.group_size} samples of a group")


def _members_of_each_strength_compare(
    sampler: SamplerConfig, advantage: AdvantageConfig, rollout: RolloutConfig
) -> None:
    if advantage.baseline == "group" or sampler.guidance is None:
        return
    if advantage.baseline == "unguided" and 0 not in sampler.guidance.strengths:
        raise ValueError(
            "advantage.baseline: unguided compares with members without guidance: put 0 among "
            "sampler.guidance.strengths, for example [0, 1]"
        )
    strengths = len(sampler.guidance.strengths)
    if rollout.group_size < 2 * strengths:
        raise ValueError(
            f"advantage.baseline: {advantage.baseline} compares with members that were guided alike: {strengths} "
            f"strengths (sampler.guidance.strengths) need groups of at least {2 * strengths}, and rollout.group_size "
            f"is {rollout.group_size}"
        )
    if advantage.best_of is not None:
        raise ValueError("advantage.best_of chooses from a whole group; leave it out, or set advantage.baseline: group")


def _trained_steps_exist(objective: ObjectiveConfig, sampler: SamplerConfig) -> None:
    trained = objective.trained_steps
    if trained is None:
        return
    if trained[1] > sampler.num_steps:
        raise ValueError(f"objective.trained_steps ends after the last of {sampler.num_steps} steps")
    if isinstance(sampler.sde_window, MovingWindowConfig):
        raise ValueError(
            "objective.trained_steps is a fixed range, and sampler.sde_window moves: let the window say what is trained"
        )


def _objective_fits_the_samples(config: RunConfig) -> None:
    objective, process, rows = config.objective, config.rewards.process, config.pools.learner.rows_per_micro_batch
    if not objective.noises_samples:
        if config.sampler.law == "ode":
            raise ValueError(
                f"sampler.law: ode has steps without a likelihood, which objective.kind: {objective.kind} trains on; "
                "take another law, or kind: nft or dpo"
            )
        return
    if process is not None and process.weight != 0 and config.advantage.mode != "outcome":
        raise ValueError(
            f"objective.kind: {objective.kind} trains on finished samples, and process rewards belong to states on the "
            "way there: set advantage.mode: outcome, or rewards.process.weight: 0"
        )
    if objective.kind == "dpo" and config.advantage.best_of != 1:
        raise ValueError("objective.kind: dpo compares the best sample of a group with the worst: advantage.best_of: 1")
    if objective.kind == "dpo" and isinstance(rows, int) and rows % 2:
        raise ValueError(
            f"pools.learner.rows_per_micro_batch ({rows}) would part a pair of objective.kind: dpo: take an even number"
        )


def _outcome_rewards_rank(config: RunConfig) -> None:
    """Refuses what goes by the weighted outcome rewards where these are all the same for lack of weights."""
    guidance, process, best_of = config.sampler.guidance, config.rewards.process, config.advantage.best_of
    weighted = any(reward.weight for reward in config.rewards.outcome)
    needed_by = {
        "sampler.guidance.source: spsa": guidance is not None and guidance.source == "spsa",
        "rewards.process.refresh": process is not None and process.refresh is not None,
        "advantage.best_of": best_of is not None,
    }
    for field, needed in needed_by.items():
        if needed and not weighted:
            raise ValueError(
                f"{field} goes by the weighted outcome rewards, all of which have weight 0: give one a weight, or "
                "leave it out"
            )
    if best_of is not None and config.advantage.mode == "process":
        raise ValueError(
            "advantage.best_of chooses by outcome advantages, which advantage.mode: process leaves out: let the mode "
            "include them, or leave advantage.best_of out"
        )
