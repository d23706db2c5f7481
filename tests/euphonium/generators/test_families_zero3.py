"""Every family under ZeRO-3: the learner starts with exactly the rollout actor's policy, and can train it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from learners.policy.checkpoint import POLICY_FILE
from tests.euphonium.generators.tiny_pipelines import BUILDERS, SHAPES, model_fields, save_pipeline
from tests.ranks import run_ranks

# The family of which another start is tested.
STARTED = "WanPipeline"
# Changes of the model's configuration, whether activations are recomputed, the largest difference between what
# learner and rollout actor compute (the last bit of a convolution may depend on where its weights lie in memory), and
# how far the gradient's norm may be from that of plain autograd.
WAYS: dict[str, tuple[dict[str, Any], bool, float, float]] = {
    "float32": ({}, False, 1e-4, 1e-4),
    "float32, recomputed": ({}, True, 1e-4, 1e-4),
    "bfloat16 adapters": ({"dtype": "bfloat16", "lora": {"rank": 2}}, False, 1e-2, 2e-2),
}


# They stand for all in every test run.
QUICK = [STARTED, "FluxPipeline", "QwenImagePipeline", "HunyuanVideo15Pipeline", "StableDiffusionPipeline"]
# Families that one start of the worker trains: all of them would take longer than a test may.
AT_ONCE = 5
OTHERS = [name for name in SHAPES if name not in QUICK]
STARTS = [QUICK, *(OTHERS[begin : begin + AT_ONCE] for begin in range(0, len(OTHERS), AT_ONCE))]
# What a rank saw of a family, by the family's name.
Seen = Callable[[str], dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    done: dict[str, dict[str, dict[str, float]]] = {}

    def of(name: str) -> dict[str, dict[str, float]]:
        if name not in done:
            (together,) = (names for names in STARTS if name in names)
            done.update(trained(together, tmp_path_factory.mktemp("zero3")))
        return done[name]

    return of


def trained(names: list[str], folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Trains some families in one start of the worker."""
    orders: dict[str, dict[str, Any]] = {}
    Image.new("RGB", (32, 32), "red").save(folder / "first_frame.png")
    for name in names:
        save_pipeline(name, folder / name)
        model = model_fields(name, folder / name)
        for way, (changes, checkpointing, *_) in WAYS.items():
            orders[f"{name}, {way}"] = {"model": model | changes, "checkpointing": checkpointing}
        if name == STARTED:
            start = str(other_weights(folder, name))
            orders[f"{name}, another start"] = {"model": model, "checkpointing": False, "start": start}
    (folder / "orders.json").write_text(json.dumps(orders))
    worker = Path(__file__).with_name("families_zero3_worker.py")
    run_ranks(1, worker, folder / "orders.json", folder / "seen.json", timeout_s=570)
    reports = json.loads((folder / "seen.json").read_text())
    return {
        name: {order.removeprefix(f"{name}, "): r for order, r in reports.items() if order.startswith(f"{name}, ")}
        for name in names
    }


def other_weights(folder: Path, name: str) -> Path:
    """A checkpoint with other weights than the saved pipeline."""
    (folder / "checkpoint").mkdir()
    state = load_file(folder / name / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({key: 1.1 * tensor for key, tensor in state.items()}, folder / "checkpoint" / POLICY_FILE)
    return folder / "checkpoint"


def test_a_policy_starts_from_the_weights_of_another_run(seen: Seen) -> None:
    report = seen(STARTED)["another start"]
    assert report["before"] <= 1e-4
    assert report["after"] > 2e-4


def test_every_family_is_trained() -> None:
    assert set(SHAPES) == set(BUILDERS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SHAPES])
@pytest.mark.parametrize("way", WAYS)
def test_the_learner_starts_with_the_rollout_policy_and_trains_it(name: str, way: str, seen: Seen) -> None:
    report = seen(name)[way]
    assert report["before"] <= WAYS[way][2]
    assert report["after"] > 2 * WAYS[way][2]
    # No weight's gradient is lost on its way through partitions, recomputation and blocks gathered whole.
    assert report["grad_norm"] == pytest.approx(report["plain_grad_norm"], rel=WAYS[way][3])
    # FLUX.2 has one block with layers of their own for queries, keys and values: four adapters of two matrices.
    assert report["trained"] >= 8
