"""The planned numbers of HunyuanVideo at full size, against those that were measured apart from this code."""

import json
from pathlib import Path

import pytest

from euphonium.config import load_config
from orchestrator.plan.hardware import GIB
from orchestrator.plan.passes import Passes

TERA = 1e12


@pytest.fixture(scope="module")
def passes() -> Passes:
    return Passes(load_config(Path("recipes/hunyuan-video/euphonium.yaml")), prm_blocks=8)


def test_sizes(passes: Passes) -> None:
    size = passes.network_size
    assert size.parameters == 12_821_012_544
    assert size.unit == pytest.approx(339.8e6, rel=1e-3)  # a dual-stream block
    assert passes.prm_size.parameters == pytest.approx(3.12e9, rel=1e-2)
    # Llama without its head, CLIP's text half, in bfloat16.
    assert passes.encoder_bytes / 2 == pytest.approx(7.505e9 + 0.123e9, rel=1e-3)


@pytest.mark.parametrize(
    ("step", "samples", "gib", "teraflops"),
    [
        ("velocity", 1, 0.8, 142), ("velocity", 8, 6.1, 1140),
        ("micro_step", 1, 4.1, 590), ("micro_step", 2, 8.1, 1180),
        # With a head that projects no tokens: their keys and values are 0.2 GiB and 0.3 TFLOP a sample.
        ("score", 8, 4.0, 152.9), ("gradient", 1, 5.8, 46.1), ("gradient", 8, 46.7, 369), ("gradient", 16, 93.4, 738),
        ("decode", 1, 8.5, 160), ("decode", 8, 67.8, 1283),
    ],
)  # fmt: skip
def test_passes(passes: Passes, step: str, samples: int, gib: float, teraflops: float) -> None:
    cost = getattr(passes, step)(samples)
    assert cost.peak_bytes / GIB == pytest.approx(gib, abs=0.05)
    assert cost.flops / TERA == pytest.approx(teraflops, rel=5e-3)


@pytest.fixture(scope="module")
def tiled() -> Passes:
    return Passes(load_config(Path("recipes/hunyuan-video/euphonium.yaml"), ["model.vae_tiling=true"]))


def test_tiles_save_memory_and_cost_operations(tiled: Passes) -> None:
    cost = tiled.decode(1)
    assert cost.peak_bytes / GIB == pytest.approx(2.5, abs=0.1)
    assert cost.flops / TERA == pytest.approx(256, rel=0.01)


def test_decoding_takes_what_an_h100_took(passes: Passes, tiled: Passes) -> None:
    measured = json.loads(Path("benchmarks/results/h100_2026-11-26.json").read_text())
    rows = {row["name"]: row["peak_gib"] for row in measured[0]["parts"]["vae"]["rows"]}
    for name, recipe, clips in (
        ("decode, 1 clip", passes, 1), ("decode, 2 clips", passes, 2), ("decode, 1 clip, tiling", tiled, 1),
    ):  # fmt: skip
        cost = recipe.decode(clips)
        planned = (recipe.vae_size.weight_bytes + cost.peak_bytes + cost.workspace_bytes) / GIB
        assert planned == pytest.approx(rows[name], rel=0.03), name
