"""Two real ZeRO-3 ranks train on noised samples: as one process does, streamed or not, and after a restart."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig, dump_config
from euphonium.wire.records import GroupPayload, GroupTask, TrainingGroup
from learners.policy.batching import load_rows, plan_updates
from learners.policy.objective import References, evaluate_objective
from tests.ranks import run_ranks

COMMON = (
    "sampler.law=ode", "sampler.eta=null", "sampler.shared_noise=false", "sampler.guidance=null",
    "rewards.process=null", "rollout.prompts_per_iteration=3", "rollout.group_size=4",
    "objective.timestep_fraction=0.75", "objective.updates_per_iteration=2", "iterations=4",
    "pools.learner.rows_per_micro_batch=4", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-4",
    "optimizer.weight_decay=0.01", "optimizer.ema_decay=0.5",
)  # fmt: skip
KINDS = {
    "nft": (*COMMON, "objective.kind=nft", "objective.nft.mixture=0.5"),
    "dpo": (*COMMON, "objective.kind=dpo", "advantage.best_of=1", "objective.kl.anchor=moving",
            "objective.kl.weight=50", "objective.kl.refresh_every=2"),
}  # fmt: skip
PROMPTS = ("a red car moving left on a white background", "a blue fish moving up on a gray background")
Iterations = list[tuple[list[TrainingGroup], list[GroupPayload]]]


def drawn(config: RunConfig) -> Iterations:
    """Groups of two iterations, with made-up advantages; of a pair the second sample is the better one."""
    worker = RolloutWorker(config, torch.device("cpu"))
    iterations: Iterations = []
    for iteration in range(2):
        groups, payloads = [], []
        for ordinal in range(3 * iteration, 3 * iteration + 3):
            task = GroupTask(group_id=ordinal, prompt=PROMPTS[ordinal % 2], seed=ordinal, iteration=iteration)
            info, _, payload = worker.generate(task, None)
            advantages = np.linspace(-1.5, 1.5, 4, dtype=np.float32)[None, :, None].repeat(4, axis=2)
            samples = np.array([0, 3] if config.objective.kind == "dpo" else [0, 1, 2, 3])
            groups.append(TrainingGroup(info=info, advantages=advantages, samples=samples, counted=len(samples)))
            payloads.append(payload)
        iterations.append((groups, payloads))
    return iterations


@pytest.fixture(scope="module")
def all_kinds(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What two ranks came to, by the objective; one start of them trains with all."""
    root = tmp_path_factory.mktemp("noised")
    prepared: dict[str, dict[str, Any]] = {}
    for kind, overrides in KINDS.items():
        folder = root / kind
        (folder / "checkpoint").mkdir(parents=True)
        config = tiny_recipe_file(folder, *overrides)
        (folder / "recipe.yaml").write_text(dump_config(config))
        prepared[kind] = {"config": config, "iterations": drawn(config)}
        (folder / "groups.pkl").write_bytes(pickle.dumps(prepared[kind]["iterations"]))
    run_ranks(2, Path(__file__).with_name("noised_worker.py"), *(root / kind for kind in KINDS), timeout_s=400)
    return {kind: torch.load(root / kind / "result.pt", weights_only=False) | prepared[kind] for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, all_kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return all_kinds[request.param]


def test_it_learns_and_reports_what_means_something(trained: dict[str, Any]) -> None:
    pairs = trained["config"].objective.kind == "dpo"
    for metrics in trained["whole"]["history"]:
        assert metrics["policy/grad_norm"] > 0
        assert metrics["policy/denoising_error"] > 0
        assert metrics["policy/transitions"] == (3 * 2 * 3 if pairs else 3 * 4 * 3)
        assert ("policy/preference_accuracy" in metrics) == ("kl/anchor" in metrics) == pairs
        assert not {"policy/ratio_mean", "policy/ratio_deviation", "policy/clip_fraction"} & metrics.keys()
    weights = trained["whole"]["weights"].items()
    assert all(torch.isfinite(tensor).all() for _, tensor in weights)
    assert not all(torch.equal(tensor, trained["before"]["weights"][name]) for name, tensor in weights)


@pytest.mark.parametrize("way", ["streamed", "resumed"])
def test_streams_and_restarts_change_no_bit(trained: dict[str, Any], way: str) -> None:
    whole, other = trained["whole"], trained[way]
    assert all(torch.equal(tensor, other["weights"][name]) for name, tensor in whole["weights"].items())
    assert other["history"][-1] == whole["history"][-1]


def test_two_ranks_do_what_one_process_does(trained: dict[str, Any]) -> None:
    config: RunConfig = trained["config"]
    worker = RolloutWorker(config, torch.device("cpu"))
    policy, family = worker.transformer, worker.family
    policy.requires_grad_(True)
    old, anchor = copy.deepcopy(policy), copy.deepcopy(policy)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    updates = 0
    for groups, payloads in trained["iterations"]:
        old.load_state_dict(policy.state_dict())
        for (share,) in plan_updates([(group.rows, group.states) for group in groups], 2, 4, 1):
            optimizer.zero_grad()
            for batch in share:
                rows = load_rows(batch, groups[batch.group], payloads[batch.group], torch.device("cpu"))
                evaluate_objective(
                    config.objective, worker.table(), lambda x, t, c: family.velocity(policy, x, t, c), rows,
                    References(
                        anchor=lambda x, t, c: family.velocity(anchor, x, t, c),
                        previous=lambda x, t, c: family.velocity(old, x, t, c), kl_weight=50.0,
                    ),
                ).loss.backward()  # fmt: skip
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            updates += 1
            if updates % 2 == 0:
                anchor.load_state_dict(policy.state_dict())
    for name, parameter in policy.named_parameters():
        expected = parameter.detach()
        torch.testing.assert_close(trained["whole"]["weights"][name], expected, atol=2e-5, rtol=0, msg=name)
