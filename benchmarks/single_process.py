"""The same training without Ray and DeepSpeed: one process, one loop, all cores for each step in turn.

    python benchmarks/single_process.py recipes/embedded/euphonium.yaml iterations=10

What a careful engineer would write first: rollout, rewards and update one after another, torch using every core. It
shares samplers, rewards and objective with the service, so that a comparison measures the orchestration alone, and it
is handy for trying a recipe's hyperparameters. With ``rollout.max_staleness`` every group is as stale as that allows,
as it is where drawing is always ahead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from actors.rollout import RolloutWorker
from actors.sampler import Velocity
from actors.sources import EqualStatesOnce
from euphonium.config import RunConfig, load_config
from euphonium.config.base import chosen
from euphonium.dynamics import StepTable
from euphonium.errors import ConfigError
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.rewards.total import weighted_total
from euphonium.wire.records import GroupPayload, TrainingGroup
from learners.policy.batching import MicroBatch, Plan, load_rows, plan_updates
from learners.policy.objective import References, Transitions, evaluate_objective, old_log_probs, replayed_log_probs
from learners.policy.objective import Velocity as VelocityOf
from learners.policy.schedules import kl_controller, kl_weight, learning_rate
from learners.rewards.refresh import PrmRefresh
from orchestrator.evaluation import evaluation_metrics, evaluation_set
from orchestrator.groups.credit import advantages, training_groups
from orchestrator.groups.guidance_control import GuidanceControl
from orchestrator.groups.prompts import PromptStream, read_prompts
from orchestrator.report.statistics import rollout_statistics
from reward_servers.orm import OrmScorer

CPU = torch.device("cpu")


class SingleProcess:
    """One training run; call :meth:`iterate` as often as there are iterations."""

    def __init__(self, config: RunConfig, device: torch.device = CPU) -> None:
        self.config = config
        self.device = device
        self.worker = RolloutWorker(config, device)
        self.policy = self.worker.transformer
        process = config.rewards.process
        self.prm: ProcessRewardModel | None = None
        if process is not None:
            self.prm = ProcessRewardModel.load(Path(process.path), config.model).to(device)
        self.refresh: PrmRefresh | None = None
        if process is not None and process.refresh is not None:
            own = ProcessRewardModel.load(Path(process.path), config.model)
            self.refresh = PrmRefresh(process.refresh, own, config.seed, device)
        self.orm = OrmScorer(config.rewards.outcome, self.worker.family, device, config.pools.orm)
        self.prompts = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.seed)
        self.evaluation = evaluation_set(config)
        settings = config.optimizer
        self.parameters = list(self.policy.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.average = [p.detach().clone() for p in self.parameters]
        kl = config.objective.kl
        self.anchor = copy.deepcopy(self.policy) if kl is not None and kl.anchor != "none" else None
        self.previous = copy.deepcopy(self.policy) if config.objective.needs_previous_policy else None
        self.controller = kl_controller(kl)
        lag = config.rollout.max_staleness
        self.guidance = GuidanceControl(config.sampler.guidance, max_staleness=lag)
        # Weights of the policy at the beginning of the last iterations, the oldest first.
        self.earlier: deque[list[Tensor]] = deque(maxlen=lag + 1)
        self.updates = 0
        self.groups = 0

    def evaluate(self) -> dict[str, float]:
        """Held-out rewards of the averaged policy."""
        prompts, seeds = self.evaluation
        with self._weights(self.average if self.config.optimizer.averages else None):
            scores = self.orm.score(self.worker.evaluate(prompts, seeds), prompts)
        return evaluation_metrics(scores, self.config.rewards.outcome)

    def iterate(self) -> dict[str, float]:
        """Draws, scores and trains on one iteration's groups."""
        config = self.config
        began = time.perf_counter()
        infos, payloads, scores = [], [], []
        iteration = self.groups // config.rollout.prompts_per_iteration
        lag = min(config.rollout.max_staleness, iteration)
        if config.rollout.max_staleness:
            self.earlier.append([p.detach().clone() for p in self.parameters])
        for _ in range(config.rollout.prompts_per_iteration):
            task = self.prompts.task(self.groups, iteration, self.guidance.strength(iteration))
            self.groups += 1
            with self._weights(self.earlier[0] if lag else None):
                info, latents, payload = self.worker.generate(task, self._source if self.prm else None)
            infos.append(dataclasses.replace(info, policy_version=iteration - lag))
            payloads.append(payload)
            scores.append(self.orm.score(latents, [task.prompt] * len(latents)))
            if self.refresh is not None:
                total = weighted_total(scores[-1], config.rewards.outcome, len(latents))
                self.refresh.add(iteration, latents, total, payload.conditioning)
        results = advantages(config, infos, scores)
        groups = training_groups(config, infos, results)
        rolled_out = time.perf_counter()
        metrics = rollout_statistics(config, infos, scores, results)
        metrics |= self.guidance.observe(iteration + 1, metrics)
        metrics |= self._update(groups, payloads, on_policy=lag == 0)
        if self.refresh is not None and self.prm is not None and self.refresh.due(iteration + 1):
            metrics |= self.refresh.update()
            self.prm.load_state_dict({name: torch.from_numpy(a) for name, a in self.refresh.weights().items()})
        metrics |= {"time/rollout_s": rolled_out - began, "time/update_s": time.perf_counter() - rolled_out}
        return metrics

    def _source(self, conditioning: dict[str, Tensor], table: StepTable, velocity: Velocity) -> EqualStatesOnce:
        assert self.prm is not None
        return EqualStatesOnce(LocalRewards(self.prm, conditioning, table.sigmas))

    def _update(
        self, groups: list[TrainingGroup], payloads: list[GroupPayload], *, on_policy: bool
    ) -> dict[str, float]:
        config = self.config
        total = sum(group.rows for group in groups)
        plan = plan_updates(
            [(group.rows, group.states) for group in groups], config.objective.updates_per_iteration,
            chosen(config.pools.learner.rows_per_micro_batch, "pools.learner.rows_per_micro_batch"), 1,
        )  # fmt: skip
        self.policy.requires_grad_(True)
        if self.previous is not None:
            _copy(self.policy, self.previous)
        clipped, norms, divergence, deviation = 0, [], 0.0, 0.0
        replayed = self._replayed(plan, groups, payloads) if on_policy else {}
        for update, shares in enumerate(plan):
            for options in self.optimizer.param_groups:
                options["lr"] = learning_rate(config, self.updates)
            self.optimizer.zero_grad(set_to_none=True)
            references = References(
                anchor=self._velocity(self.anchor),
                previous=self._velocity(self.previous) if update > 0 else None,
                kl_weight=kl_weight(config.objective.kl, self.controller),
            )
            observed = 0.0
            for position, batch in enumerate(shares[0]):
                group = groups[batch.group]
                rows = self._rows(batch, group, payloads[batch.group])
                if old_log_probs(config, update, on_policy=on_policy) == "own":
                    rows = dataclasses.replace(rows, own_old=True)
                elif (update, position) in replayed:
                    rows = dataclasses.replace(rows, log_probs=replayed[update, position])
                value = evaluate_objective(
                    config.objective, self.worker.table(group.info.task.iteration),
                    lambda x, t, c: self.worker.family.velocity(self.policy, x, t, c), rows, references,
                )  # fmt: skip
                value.loss.backward()
                if not norms:
                    deviation = max(deviation, float(value.deviation.max()))
                clipped += int(value.clipped.sum())
                observed += float((value.kl_anchor if self.anchor is not None else value.kl_previous).sum())
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.max_grad_norm)))
            self.optimizer.step()
            self.updates += 1
            self._after_update(observed * shares[0][0].weight)
            divergence += observed / total
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - config.optimizer.ema_decay)
        self.policy.requires_grad_(False)
        return {
            "policy/grad_norm": float(np.mean(norms)),
            "policy/clip_fraction": clipped / total,
            "policy/ratio_deviation": deviation,
            "kl/observed": divergence,
        }

    def _replayed(
        self, plan: Plan, groups: list[TrainingGroup], payloads: list[GroupPayload]
    ) -> dict[tuple[int, int], Tensor]:
        """Old log-probabilities that are computed before the first update, by update and position."""
        return {
            (update, position): replayed_log_probs(
                self.worker.table(groups[batch.group].info.task.iteration),
                lambda x, t, c: self.worker.family.velocity(self.policy, x, t, c),
                self._rows(batch, groups[batch.group], payloads[batch.group]),
            )
            for update, shares in enumerate(plan)
            for position, batch in enumerate(shares[0])
            if old_log_probs(self.config, update, on_policy=True) == "replay"
        }

    def _rows(self, batch: MicroBatch, group: TrainingGroup, payload: GroupPayload) -> Transitions:
        return load_rows(batch, group, payload, self.device, guided_mean=self.config.objective.kind == "standard")

    def _velocity(self, model: nn.Module | None) -> VelocityOf | None:
        if model is None:
            return None
        return lambda x, time, conditioning: self.worker.family.velocity(model, x, time, conditioning)

    def _after_update(self, observed: float) -> None:
        kl = self.config.objective.kl
        if self.controller is not None:
            self.controller.observe(observed)
        if kl is not None and kl.anchor == "moving" and self.updates % kl.refresh_every == 0:
            assert self.anchor is not None
            _copy(self.policy, self.anchor)

    @contextmanager
    def _weights(self, weights: list[Tensor] | None) -> Iterator[None]:
        """Has the policy compute with other weights for a while; None leaves its own."""
        if weights is None:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        self._load(weights)
        try:
            yield
        finally:
            self._load(current)

    def _load(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, weights)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = list(source.parameters())
    torch._foreach_copy_(targets, sources)


def main() -> None:
    """Command line: a recipe and its overrides; a line of JSON an iteration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_intermixed_args()
    try:
        config: RunConfig = load_config(options.recipe, options.overrides)
    except ConfigError as error:
        parser.error(str(error))
    run = SingleProcess(config)
    print(json.dumps({"iteration": 0} | run.evaluate()), flush=True)
    for iteration in range(1, config.iterations + 1):
        record: dict[str, float] = {"iteration": iteration} | run.iterate()
        if iteration % config.evaluation.every == 0 or iteration == config.iterations:
            record |= run.evaluate()
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
