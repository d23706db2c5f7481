"""The planned numbers of HunyuanVideo at full size, against those that were measured apart from this code."""

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
        ("score", 8, 4.0, 155), ("gradient", 1, 6.0, 47), ("gradient", 8, 48.3, 374), ("gradient", 16, 96.7, 748),
        ("decode", 1, 8.5, 160), ("decode", 8, 67.8, 1283),
    ],
)  # fmt: skip
def test_passes(passes: Passes, step: str, samples: int, gib: float, teraflops: float) -> None:
    cost = getattr(passes, step)(samples)
    assert cost.peak_bytes / GIB == pytest.approx(gib, abs=0.05)
    assert cost.flops / TERA == pytest.approx(teraflops, rel=5e-3)


def test_tiles_save_memory_and_cost_operations() -> None:
    tiled = Passes(load_config(Path("recipes/hunyuan-video/euphonium.yaml"), ["model.vae_tiling=true"])).decode(1)
    assert tiled.peak_bytes / GIB == pytest.approx(2.5, abs=0.1)
    assert tiled.flops / TERA == pytest.approx(256, rel=0.01)
