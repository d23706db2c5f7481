"""Ranks that share the tokens of every sample get the losses, gradients and weights of ranks that do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from euphonium.config import RunConfig
from tests.learners.policy.test_bf16 import LORA, recipe_of
from tests.ranks import run_ranks

EXACT = (
    "model.dtype=float32", "objective.updates_per_iteration=1", "objective.clip_range=0.5",
    "objective.ratio_tolerance=10", "objective.ratio_tolerance_p99=10", "optimizer.eps=1e-4",
    "optimizer.weight_decay=0.01", "optimizer.ema_decay=0.9",
)  # fmt: skip
CHECKPOINTING = ("pools.learner.gradient_checkpointing=true",)
# A copy of the policy, or an adapter, for the anchor, and another for the policy that drew the groups.
REFERENCES = (
    "objective.kl={weight: 0.1, anchor: moving, refresh_every: 1, previous: gaussian}",
    "objective.ratio_normalisation=true",
)
# The generator that comes with the project; all others have two heads.
FOUR_HEADS = "hunyuan, four heads"
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wan": ("wan", CHECKPOINTING),
    "hunyuan with true CFG": ("hunyuan with true CFG", (LORA,)),
    "flux": ("flux", ()),
    "wan with references": ("wan", REFERENCES),
    "wan, adapter": ("wan", (LORA, *CHECKPOINTING, *REFERENCES)),
    "wan, whole weights": ("wan", ("pools.learner.shard=optimizer",)),
    "flux, adapter": ("flux with true CFG", (LORA, *CHECKPOINTING)),
    "hunyuan": ("hunyuan", CHECKPOINTING),
    "hunyuan, layer by layer": ("hunyuan with true CFG", ("pools.learner.gather_blocks=false",)),
    "hunyuan 1.5": ("hunyuan 1.5", (*CHECKPOINTING, *REFERENCES)),
    "hunyuan 1.5, adapter": ("hunyuan 1.5", (LORA,)),
    "skyreels": ("skyreels", CHECKPOINTING),
    FOUR_HEADS: (
        "hunyuan",
        (
            "model.path=EMBEDDED", "model.frames=9", "model.height=32", "model.width=32",
            "model.embedded_guidance=null", *CHECKPOINTING, *REFERENCES,
        ),
    ),
}  # fmt: skip
# Ways that are trained in one start of four ranks.
TOGETHER = 4
QUICK = ["wan", "hunyuan with true CFG", "flux"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trained(
    folders: Callable[[str], Path], tiny_recipe_file: Callable[..., RunConfig], tiny_generator: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int, list[str]], dict[str, Any]]:  # fmt: skip
    """What a number of ranks came to, by way and by the ranks that share a sample."""
    done: dict[tuple[int, str], Any] = {}

    def train(ranks: int, ways: list[str]) -> dict[str, Any]:
        if missing := [way for way in ways if (ranks, way) not in done]:
            root = tmp_path_factory.mktemp("shared")
            recipes = []
            for way in missing:
                case, overrides = WAYS[way]
                overrides = tuple(override.replace("EMBEDDED", str(tiny_generator)) for override in overrides)
                recipes.append(recipe_of(root / way, case, folders, tiny_recipe_file, *EXACT, *overrides))
            worker = Path(__file__).with_name("sequence_worker.py")
            run_ranks(ranks, worker, root / "results.pt", *recipes, timeout_s=800)
            results = torch.load(root / "results.pt", weights_only=False)
            done.update({(ranks, way): results[way] for way in missing})
        return {way: done[ranks, way] for way in ways}

    return train


def check(results: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    alone, shared = results[1], results[ranks]
    for ours, expected in zip(shared, alone, strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/ratio_mean", "policy/clip_fraction"):
            assert ours["metrics"][name] == pytest.approx(expected["metrics"][name], abs=TOLERANCE, rel=TOLERANCE)
        assert ours["metrics"]["policy/transitions"] == expected["metrics"]["policy/transitions"]
        for kind in ("weights", "moments", "averages"):
            assert ours[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                torch.testing.assert_close(ours[kind][name], tensor, atol=TOLERANCE, rtol=0)
    gradients = alone[0]["moments"]
    largest = max(float(tensor.abs().max()) for tensor in gradients.values())
    for name, tensor in gradients.items():
        # The first moment after the first update is a multiple of the gradient.
        difference = float((shared[0]["moments"][name] - tensor).abs().max())
        assert difference < TOLERANCE * largest, f"gradient of {name}"
    moved = [float((alone[1]["weights"][n] - tensor).abs().max()) for n, tensor in alone[0]["weights"].items()]
    assert max(moved) > 50 * TOLERANCE


@pytest.mark.parametrize("way", QUICK)
def test_two_ranks_that_share_their_samples(trained: Callable[..., dict[str, Any]], way: str) -> None:
    check(trained(2, QUICK)[way], 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_that_share_theirs(trained: Callable[..., dict[str, Any]], way: str) -> None:
    ways = list(WAYS)
    begin = ways.index(way) // TOGETHER * TOGETHER
    results = trained(4, ways[begin : begin + TOGETHER])[way]
    assert results.keys() == ({1, 2, 4} if way == FOUR_HEADS else {1, 2})
    for ranks in results.keys() - {1}:
        check(results, ranks)
