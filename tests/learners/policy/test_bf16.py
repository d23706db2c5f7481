"""Every family's tiny model in bfloat16 through a run's whole path: rollout, transport, update, weights, checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from euphonium.config import RunConfig, dump_config
from tests.euphonium.generators.cases import CASES, PROMPTS, TRANSFORMERS
from tests.ranks import run_ranks

LORA = "model.lora={rank: 4, alpha: 8}"
# With a learning rate that moves nothing, all updates must divide by the very numbers that they compute.
STILL = ("objective.updates_per_iteration=2", "optimizer.learning_rate=1e-30")
WAYS = {
    f"{name}, {way}": (name, overrides)
    for name in [*TRANSFORMERS, "sd1"]
    for way, overrides in (("full", ()), ("adapter", (LORA,)))
} | {"hunyuan, standing still": ("hunyuan", STILL)}
# NCCL wants a GPU for every rank.
RANKS = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 2
QUICK = ["wan, full", "hunyuan 1.5, adapter", "hunyuan, standing still"]
SLOW = [way for way in WAYS if way not in QUICK]
# Ways that one start of the ranks trains: all of them would take longer than a test may.
AT_ONCE = 8


@pytest.fixture(scope="module")
def trained(
    folders: Callable[[str], Path], tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], dict[str, Any]]:
    """What two ranks saw, by way, for given ways, which are trained in one start of the ranks."""
    done: dict[str, Any] = {}

    def train(ways: list[str]) -> dict[str, Any]:
        if missing := [way for way in ways if way not in done]:
            root = tmp_path_factory.mktemp("bf16")
            recipes = [recipe_of(root / way, WAYS[way][0], folders, tiny_recipe_file, *WAYS[way][1]) for way in missing]
            done.update(seen_by_ranks(recipes, root))
        return done

    return train


def seen_by_ranks(recipes: list[Path], root: Path) -> dict[str, Any]:
    run_ranks(RANKS, Path(__file__).with_name("bf16_worker.py"), root / "seen.json", *recipes, timeout_s=600)
    seen: dict[str, Any] = json.loads((root / "seen.json").read_text())
    return seen


def recipe_of(
    folder: Path, name: str, folders: Callable[[str], Path], tiny_recipe_file: Callable[..., RunConfig], *overrides: str
) -> Path:
    """Writes the recipe of a case's tiny model, with its prompts and their pictures."""
    case = CASES[name]
    folder.mkdir()
    for i in range(len(PROMPTS)):
        Image.new("RGB", (40, 40), (80 * i, 100, 20)).save(folder / f"{i}.png")
    lines = [json.dumps({"prompt": prompt, "image": f"{i}.png"}) for i, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    frames, height, width = case.size
    guidance = {"model.embedded_guidance": case.embedded_guidance, "model.cfg_scale": case.cfg_scale}
    law = ["sampler.law=ddim", "sampler.shift=1"] if name == "sd1" else ["sampler.law=flow_grpo", "sampler.shift=3"]
    config = tiny_recipe_file(
        folder, f"model.path={folders(case.tiny)}", f"model.frames={frames}", f"model.height={height}",
        f"model.width={width}", *(f"{field}={value}" for field, value in guidance.items() if value), *law,
        *(f"model.{field}={value}" for field, value in case.more.items()),
        "model.dtype=bfloat16", "rewards.process=null", "sampler.guidance=null", "sampler.num_steps=3",
        f"prompts.train={folder}/prompts.jsonl", f"prompts.evaluation={folder}/prompts.jsonl",
        "objective.clip_range=1e-4", "optimizer.learning_rate=1e-3", "pools.learner.rows_per_micro_batch=2",
        *overrides,
    )  # fmt: skip
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(config))
    return recipe


def check(seen: dict[str, Any], way: str) -> None:
    assert seen["sent"] == ["|V2"], "the conditioning travels in the generator's type"
    assert seen["types"] == ["torch.bfloat16"]
    assert (seen["moved"] > 1e-6) == (WAYS[way][1] != STILL)
    for metrics in seen["metrics"]:
        assert metrics["policy/grad_norm"] > 0
        assert metrics["policy/ratio_deviation"] < 2e-3
        # On-policy, whatever bfloat16 makes of the rollout's numbers.
        assert metrics["policy/ratio_mean"] == 1
        assert metrics["policy/clip_fraction"] == 0
    # A restart continues with the very numbers.
    assert seen["repeated"] == seen["metrics"][-1]


@pytest.mark.parametrize("way", QUICK)
def test_a_bfloat16_policy_trains(trained: Callable[[list[str]], dict[str, Any]], way: str) -> None:
    check(trained(QUICK)[way], way)


@pytest.mark.slow
@pytest.mark.parametrize("way", SLOW)
def test_every_bfloat16_policy_trains(trained: Callable[[list[str]], dict[str, Any]], way: str) -> None:
    begin = SLOW.index(way) // AT_ONCE * AT_ONCE
    check(trained(SLOW[begin : begin + AT_ONCE])[way], way)
