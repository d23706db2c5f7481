"""KL references, replay and adapters at world size 2, against the same objective on plain modules."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.generators.lora import initial_adapter
from learners.policy.batching import MicroBatch, load_rows
from learners.policy.objective import References, evaluate_objective, replayed_log_probs
from tests.learners.groups import training_group

CPU = torch.device("cpu")
COMMON = (
    "rollout.prompts_per_iteration=3", "objective.updates_per_iteration=2", "pools.learner.rows_per_micro_batch=5",
    "optimizer.learning_rate=1e-3", "optimizer.eps=1e-4", "objective.clip_range=0.5", "objective.ratio_tolerance=10",
    "objective.ratio_tolerance_p99=10", "objective.old_log_probs=rollout",
)  # fmt: skip
KL = (
    "objective.kl={weight: 0.5, anchor: moving, anchor_weight: 2, refresh_every: 3, previous: gaussian}",
    "objective.step_weights=equaliser",
)
CASES = {
    "dual moving KL": (*KL, "pools.learner.offload_references=true"),
    "fixed anchor, replay, guard": (
        "objective.kl={weight: 0.5, anchor: fixed, previous: k3}", "objective.old_log_probs=learner",
        "objective.ratio_normalisation=true",
    ),
    "adapters with dual moving KL": (*KL, "model.lora={rank: 4, alpha: 8}"),
    "adapters with dual moving KL on whole weights": (
        *KL, "model.lora={rank: 4, alpha: 8}", "pools.learner.shard=optimizer"
    ),
    "adapters with fixed anchor": ("objective.kl={weight: 0.5, anchor: fixed}", "model.lora={rank: 4, alpha: 8}"),
}  # fmt: skip


class PlainLearner:
    """One process, no partitioning: references are deep copies."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.worker = RolloutWorker(config, CPU)
        self.model = self.worker.transformer
        self.trained = self.worker.published
        if config.model.lora is not None:
            values = initial_adapter({name: p.shape for name, p in self.trained.items()})
            with torch.no_grad():
                for name, p in self.trained.items():
                    p.copy_(values[name])
        for p in self.trained.values():
            p.requires_grad_(True)
        settings = config.optimizer
        self.adamw = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, eps=settings.eps, weight_decay=0
        )
        self.anchor = copy.deepcopy(self.model)
        self.done = 0

    def velocity(self, model: nn.Module) -> Any:
        return lambda x, time, conditioning: self.worker.family.velocity(model, x, time, conditioning)

    def run(self, iterations: list) -> tuple[dict[str, Tensor], list[float]]:
        objective, anchors = self.config.objective, []
        for payloads, advantages in iterations:
            previous = copy.deepcopy(self.model)
            groups = [(training_group(p, a[None]), p) for p, a in zip(payloads, advantages, strict=True)]
            total = 0.0
            for update in range(2):
                loss = torch.zeros(())
                members = groups[update::2]
                count = sum(group.rows for group, _ in members)
                for group, payload in members:
                    batch = MicroBatch(group=0, begin=0, end=group.states, weight=1 / count)
                    rows = load_rows(batch, group, payload, CPU)
                    table = self.worker.table()
                    if objective.old_log_probs == "learner":
                        replayed = replayed_log_probs(table, self.velocity(previous), rows)
                        rows = type(rows)(**(vars(rows) | {"log_probs": replayed}))
                    references = References(
                        anchor=self.velocity(self.anchor), previous=self.velocity(previous),
                        kl_weight=objective.kl.weight if objective.kl else 0.0,
                    )  # fmt: skip
                    value = evaluate_objective(objective, table, self.velocity(self.model), rows, references)
                    loss = loss + value.loss
                    total += float(value.kl_anchor.sum())
                self.adamw.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.optimizer.max_grad_norm)
                self.adamw.step()
                self.done += 1
                kl = objective.kl
                if kl is not None and kl.anchor == "moving" and self.done % kl.refresh_every == 0:
                    self.anchor = copy.deepcopy(self.model)
            anchors.append(total / sum(group.rows for group, _ in groups))
        return {name: p.detach() for name, p in self.trained.items()}, anchors


ADAPTERS = "adapters with dual moving KL"
# One start of the ranks trains them all.
QUICK = ("dual moving KL", "fixed anchor, replay, guard", ADAPTERS)


@pytest.fixture(scope="module")
def trained_with(train_on_two_ranks: Callable[..., dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    def train(case: str) -> dict[str, Any]:
        together = QUICK if case in QUICK else (case,)
        return train_on_two_ranks(case, {other: (*COMMON, *CASES[other]) for other in together})

    return train


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_two_ranks_equal_a_plain_loop(trained_with: Callable[[str], dict[str, Any]], case: str) -> None:
    trained = trained_with(case)
    weights, anchors = PlainLearner(trained["config"]).run(trained["iterations"])
    rank = trained["ranks"][0]
    assert set(rank["whole"]) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(rank["whole"][name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    # The divergence from the anchor grows: references do not follow the policy by themselves.
    measured = [entry["kl/anchor"] for entry in rank["history"]]
    np.testing.assert_allclose(measured, anchors, rtol=1e-3, atol=1e-9)
    assert measured[1] > 1e-7


def test_adapters_alone_are_trained_and_published(trained_with: Callable[[str], dict[str, Any]]) -> None:
    rank = trained_with(ADAPTERS)["ranks"][0]
    assert all(".lora_" in name for name in rank["whole"])
    total = sum(t.numel() for t in rank["whole"].values())
    assert total < 0.1 * 2_600_000
    assert any(float(t.abs().max()) > 0 for name, t in rank["whole"].items() if ".lora_B." in name)
