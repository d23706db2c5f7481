"""The learner group at world size 2, against a plain single-process loop."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.errors import TrainingError
from euphonium.generators.conditioning import expand
from learners.engine.partitioned import gather_by_block

UPDATES, ITERATIONS, GROUPS = 2, 2, 3
OVERRIDES = (
    "rollout.prompts_per_iteration=3", "objective.updates_per_iteration=2", "pools.learner.rows_per_micro_batch=5",
    "pools.learner.persistence_threshold=100", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-4",
    "optimizer.max_grad_norm=0.05", "optimizer.weight_decay=0.01", "optimizer.ema_decay=0.9",
    "objective.clip_range=0.5", "objective.ratio_tolerance=10",
    "objective.ratio_tolerance_p99=10", "objective.old_log_probs=rollout", "optimizer.schedule=linear", "iterations=4",
)  # fmt: skip


def reference(config: RunConfig, iterations: list) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The same objective written out plainly: one process, whole batches, the score form of the dance law."""
    worker = RolloutWorker(config, torch.device("cpu"))
    model = worker.transformer.requires_grad_(True).train()
    settings = config.optimizer
    adamw = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    shift, steps, eta = config.sampler.shift, config.sampler.num_steps, config.sampler.eta
    uniform = np.linspace(1, 0, steps + 1)
    sigmas = torch.tensor(shift * uniform / (1 + (shift - 1) * uniform)).float()
    done, norms = 0, []
    for payloads, advantages in iterations:
        for update in range(UPDATES):
            losses = []
            for g in range(update, GROUPS, UPDATES):
                payload = payloads[g]
                rows, states = payload.rows.flatten(), torch.tensor(payload.states)
                k = torch.tensor(payload.steps).flatten()
                shape = (-1, 1, 1, 1, 1)
                sigma, delta = sigmas[k].view(shape), (sigmas[k] - sigmas[k + 1]).view(shape)
                prompt = {n: torch.tensor(a) for n, a in payload.conditioning.items()}
                x = states[rows]
                v = worker.family.velocity(model, x, sigmas[k], expand(prompt, len(k)))
                variance = eta**2 * delta
                mean = x - delta * v - variance / 2 * (x + (1 - sigma) * v) / sigma
                density = torch.distributions.Normal(mean, variance.sqrt())
                log_prob = density.log_prob(states[torch.tensor(payload.next_rows).flatten()]).flatten(1).mean(1)
                ratio = torch.exp(log_prob - torch.tensor(payload.log_probs).flatten())
                samples = torch.arange(len(k)) // payload.steps.shape[1]
                advantage = torch.tensor(advantages[g])[samples, k]
                losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage))
            adamw.param_groups[0]["lr"] = settings.learning_rate * (1 - done / (config.iterations * UPDATES))
            adamw.zero_grad()
            torch.cat(losses).mean().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)))
            adamw.step()
            done += 1
            with torch.no_grad():
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - settings.ema_decay)
    return {name: p.detach() for name, p in model.named_parameters()}, average, norms


class DoublingTransformerBlock(nn.Module):
    def forward(self, hidden_states: Tensor, scale: float = 2.0) -> Tensor:
        return scale * hidden_states


class Blocks(nn.Module):
    _no_split_modules = ("DoublingTransformerBlock",)

    def __init__(self) -> None:
        super().__init__()
        self.block = DoublingTransformerBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(hidden_states=x)


# Prompts and the negative one have different lengths: ranks attend in parts that differ.
WAYS = {
    "plain": (),
    "with guidance": ("model.cfg_scale=2", "model.negative_prompt=blurry"),
    "whole weights": ("pools.learner.shard=optimizer",),
    "options of DeepSpeed": (
        "pools.learner.deepspeed={zero_hpz_partition_size: 2, reduce_bucket_size: 100000, "
        "stage3_max_live_parameters: 300000, stage3_max_reuse_distance: 200000, stage3_prefetch_bucket_size: 150000}",
    ),
}  # fmt: skip


# Two of them stand for all in every test run; one start of the ranks trains both.
QUICK = ("plain", "with guidance")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WAYS]
)
def both(request: pytest.FixtureRequest, train_on_two_ranks: Callable) -> dict:
    name = request.param
    together = QUICK if name in QUICK else (name,)
    trained = train_on_two_ranks(name, {other: (*OVERRIDES, *WAYS[other]) for other in together})
    expected = reference(trained["config"], trained["iterations"])
    return {"ranks": trained["ranks"], "reference": expected, "config": trained["config"]}


def test_parameters_really_are_sharded(both: dict) -> None:
    for rank in both["ranks"]:
        total = sum(rank["numels"].values())
        held = sum(rank["pieces"].values())
        # Each rank holds half of everything (up to padding), and whole parameters only below the threshold.
        assert total / 2 <= held < total / 2 * 1.01
        if both["config"].pools.learner.shard == "optimizer":
            assert rank["resident"] == total
        else:
            assert rank["resident"] < 0.02 * total
    assert both["ranks"][1]["whole"] == {}


def test_updates_equal_a_single_process_loop(both: dict) -> None:
    weights, average, norms = both["reference"]
    rank = both["ranks"][0]
    assert set(rank["whole"]) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(rank["whole"][name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(rank["average"][name], average[name], atol=1e-5, rtol=0)
    ours = [entry["policy/grad_norm"] for entry in rank["history"]]
    expected = np.array(norms).reshape(ITERATIONS, UPDATES).mean(1)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_first_pass_is_on_policy_and_later_updates_are_not(both: dict) -> None:
    first, second = both["ranks"][0]["history"]
    assert first["policy/ratio_deviation"] < 1e-5
    # The second iteration's groups came from the untrained weights.
    assert second["policy/ratio_deviation"] > 1e-5
    assert both["ranks"][1]["history"][0] == first


def test_weights_did_move(both: dict, tiny_generator: Path) -> None:
    from safetensors.torch import load_file

    start = load_file(next((tiny_generator / "transformer").glob("*.safetensors")))
    moved = max(float((both["ranks"][0]["whole"][n] - t).abs().max()) for n, t in start.items())
    assert moved > 1e-3


def test_a_block_that_would_lose_gradients_is_refused() -> None:
    model = Blocks()
    gather_by_block(model)
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(model(x), 2 * x)
    with torch.no_grad():
        model(torch.ones(2))
    with pytest.raises(TrainingError, match=r"set pools\.learner\.gather_blocks"):
        model(torch.ones(2))
