"""What an iteration of a recipe consists of: passes, how large they are, transitions, bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Any

from euphonium.config import RunConfig
from euphonium.config.base import chosen
from euphonium.generators.generator import Generator
from orchestrator.plan.inputs import conditioning
from orchestrator.plan.tail import Tail, piece_of, tail_of

FLOAT32 = 4


# The recipe's field that sets the size of each pass.
SIZE_FIELDS = {
    "rollout": "rollout.samples_per_pass",
    "prm": "pools.prm.max_batch",
    "decode": "pools.orm.decode_batch",
    "learner": "pools.learner.rows_per_micro_batch",
    "refresh": "rewards.process.refresh.pairs_per_micro_batch",
}
SHARD_FIELD = "pools.learner.shard"


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """Samples or transitions in one pass of each role: the one place where a plan reads them from the recipe.

    Attributes:
        rollout: samples of a velocity pass of a rollout.
        evaluation: samples of a velocity pass of an evaluation.
        prm: states of a pass of a PRM server.
        decode: samples that an ORM server decodes at a time.
        learner: transitions of a micro-batch.
        refresh: pairs in a micro-batch of the process reward model's refresh; 0 without one.
        whole_weights: whether every rank of the learner keeps the policy's weights whole.
        sharing: ranks of the learner that share a sample's tokens.
    """

    rollout: int
    evaluation: int
    prm: int
    decode: int
    learner: int
    refresh: int
    whole_weights: bool
    sharing: int

    @classmethod
    def of(cls, config: RunConfig) -> PassSizes:
        """Reads a recipe; the largest passes that its requests allow.

        Raises:
            ConfigError: one is ``auto``, and not yet chosen (choice.py).
        """
        group, pools, evaluation = config.rollout.group_size, config.pools, config.evaluation
        together, states, decoded, rows = (
            chosen(value, field)
            for value, field in (
                (config.rollout.samples_per_pass, SIZE_FIELDS["rollout"]),
                (pools.prm.max_batch, SIZE_FIELDS["prm"]),
                (pools.orm.decode_batch, SIZE_FIELDS["decode"]),
                (pools.learner.rows_per_micro_batch, SIZE_FIELDS["learner"]),
            )
        )
        evaluated = evaluation.prompts * evaluation.samples_per_prompt
        shares = -(-evaluated // pools.rollout.num_actors)
        clients = pools.rollout.num_actors if pools.prm.merge else 1
        merged = max(group, group * min(clients, states // group))
        scored = max(evaluated, group * config.rollout.prompts_per_iteration if pools.orm.merge else group)
        return cls(
            rollout=min(together, group),
            evaluation=min(together, shares),
            prm=min(states, merged),
            decode=min(decoded, pools.orm.max_batch, scored),
            learner=rows,
            refresh=_refreshed_pairs(config),
            whole_weights=chosen(pools.learner.shard, SHARD_FIELD) == "optimizer",
            sharing=pools.learner.sequence_parallel,
        )


def _refreshed_pairs(config: RunConfig) -> int:
    refresh = config.rewards.process.refresh if config.rewards.process is not None else None
    if refresh is None:
        return 0
    pairs = refresh.pairs_per_update if refresh.pairs_per_micro_batch is None else refresh.pairs_per_micro_batch
    return min(chosen(pairs, SIZE_FIELDS["refresh"]), refresh.pairs_per_update)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An iteration.

    Attributes:
        groups: groups, one a prompt.
        group_size: samples of a group.
        steps: sampling steps, each a velocity.
        alike: of these, steps before which all samples of a group are in one state, so that one velocity serves them.
        guided: of these, steps with a gradient of the process reward.
        scored: further states whose process reward is needed.
        decodes: decoded samples for each that is drawn: 1, and two a perturbation of guidance by SPSA.
        rows: transitions of a group that are trained.
        states: different states that these leave, each of which the learner's network sees once.
        updates: optimizer steps.
        refreshed_pairs: pairs that the process reward model's refresh trains on, on average over the iterations.
        references: further forward passes of a transition, on average: anchor, previous policy, replay.
        latent_values: numbers of a sample's latents.
        group_bytes: bytes of a group's transitions.
        evaluation_velocities: velocities of an evaluation.
        evaluation_samples: samples of an evaluation.
        piece: samples of a group that are always drawn together; all of them where groups are not cut.
    """

    groups: int
    group_size: int
    steps: int
    alike: int
    guided: int
    scored: int
    decodes: int
    rows: int
    states: int
    updates: int
    refreshed_pairs: float
    references: float
    latent_values: int
    group_bytes: int
    evaluation_velocities: int
    evaluation_samples: int
    piece: int

    @property
    def samples(self) -> int:
        """Samples of an iteration."""
        return self.groups * self.group_size

    def tail(self, actors: int) -> Tail:
        """How drawing ends with so many rollout actors."""
        return tail_of(self.groups, actors, self.group_size, self.piece)

    @property
    def velocity_steps(self) -> float:
        """Velocities of a sample; those that serve a whole group count for it together."""
        return self.steps - self.alike * (1 - 1 / self.group_size)

    @property
    def iteration_bytes(self) -> int:
        """Bytes of the trajectories of an iteration."""
        return self.groups * self.group_bytes

    def micro_batches(self, rows_per_micro_batch: int, ranks: int) -> int:
        """Micro-batches of every rank in an iteration; a micro-batch mixes no groups, and ranks keep step."""
        pieces = -(-self.states // rows_per_micro_batch)
        return sum(
            -(-pieces * len(range(update, self.groups, self.updates)) // ranks) for update in range(self.updates)
        )


def workload_of(config: RunConfig, generator: Generator) -> Workload:
    """The workload of a recipe; a moving window counts as at first, one that is drawn for every group as the middle."""
    from actors.sampler import last_shared_state, scored_states
    from actors.training_rows import stored_states, trained_steps

    rollout, objective, guidance = config.rollout, config.objective, config.sampler.guidance
    table = generator.step_table(config.sampler.of_group())
    steps = trained_steps(config, table, 0)
    shared = last_shared_state(config, table)
    places, stored = stored_states(config, table, steps)
    best = config.advantage.best_of
    trained = rollout.group_size if best is None else 2 * best
    spsa = guidance is not None and guidance.source == "spsa"
    guided = len(table.guided_steps) if config.rewards.process is not None and not spsa else 0
    values = prod(generator.latent_shape)
    if objective.kind == "standard" and table.guided_steps:
        stored += steps.numel()
    prompt = sum(tensor.nbytes for tensor in conditioning(generator, 1).values())
    kl = objective.kl
    evaluation = config.evaluation
    refresh = config.rewards.process.refresh if config.rewards.process is not None else None
    evaluated = evaluation.prompts * evaluation.samples_per_prompt
    return Workload(
        groups=rollout.prompts_per_iteration,
        group_size=rollout.group_size,
        steps=table.num_steps,
        alike=0 if shared is None else shared + 1,
        guided=guided,
        scored=len(set(scored_states(config, table)) - set(table.guided_steps)),
        decodes=1 + 2 * guidance.spsa.perturbations * len(table.guided_steps) if guidance is not None and spsa else 1,
        rows=trained * steps.shape[1],
        states=len(places[:trained].unique()),
        updates=objective.updates_per_iteration,
        refreshed_pairs=refresh.updates * refresh.pairs_per_update / refresh.every if refresh is not None else 0.0,
        references=(kl is not None and kl.anchor != "none") + _previous(config) + _replayed(config),
        latent_values=values,
        group_bytes=FLOAT32 * stored * values + prompt,
        evaluation_velocities=evaluated * evaluation.num_steps,
        evaluation_samples=evaluated,
        piece=piece_of(rollout),
    )


def _previous(config: RunConfig) -> float:
    """Share of the rows that the policy which the iteration began with computes too: not those of the first update."""
    updates = config.objective.updates_per_iteration
    return config.objective.needs_previous_policy * (updates - 1) / updates


def _replayed(config: RunConfig) -> float:
    """Share of the transitions whose old log-probabilities the learner computes in a pass of their own."""
    from learners.policy.objective import old_log_probs

    updates = config.objective.updates_per_iteration
    on_policy = config.rollout.max_staleness == 0
    return sum(old_log_probs(config, i, on_policy=on_policy) == "replay" for i in range(updates)) / updates


def replaced(sizes: PassSizes, **changes: Any) -> PassSizes:
    """Other sizes of passes."""
    return dataclasses.replace(sizes, **changes)
