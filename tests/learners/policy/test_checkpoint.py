"""Checkpoints of the learner group, read by groups of another size."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from euphonium.config import RunConfig, dump_config
from euphonium.errors import CheckpointError
from learners.engine.shards import Shards
from learners.policy.checkpoint import FOLDER
from tests.ranks import run_ranks

OVERRIDES = (
    "rollout.prompts_per_iteration=3", "objective.updates_per_iteration=2", "pools.learner.rows_per_micro_batch=5",
    "pools.learner.persistence_threshold=100", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-4",
    "optimizer.weight_decay=0.01", "optimizer.ema_decay=0.9", "objective.clip_range=0.5",
    "objective.ratio_tolerance=10", "objective.ratio_tolerance_p99=10", "objective.old_log_probs=rollout",
    "objective.kl.anchor=moving", "objective.kl.refresh_every=1",
    "objective.kl.controller.target=0.1", "objective.kl.controller.warmup_updates=3", "iterations=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory, drawn: Callable
) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_recipe_file(folder, *OVERRIDES)
    (folder / "recipe.yaml").write_text(dump_config(config))
    (folder / "groups.pkl").write_bytes(pickle.dumps(drawn(config)))

    def go(ranks: int, **job: Any) -> dict[str, Any]:
        job = {"load": None, "save": None, "save_after": None, "result": "result.pt", **job}
        (folder / "job.json").write_text(json.dumps(job))
        for name in filter(None, [job["save"]]):
            (folder / name).mkdir()
        run_ranks(ranks, Path(__file__).with_name("resume_worker.py"), folder, folder / "job.json", timeout_s=300)
        return dict(torch.load(folder / "result.pt", weights_only=True)) | {"folder": folder}

    return go


def test_a_run_goes_on_with_any_number_of_ranks(run: Callable[..., dict[str, Any]]) -> None:
    unbroken = run(2, iterations=[0, 1], save="two", save_after=0)
    folder = unbroken["folder"]
    for rank in (0, 1):
        with safe_open(folder / "two" / FOLDER / f"shard_{rank:05d}_of_00002.safetensors", "pt") as stream:
            kinds = {key.split("/")[0] for key in stream.keys()}  # noqa: SIM118 - safe_open is no mapping
        assert kinds == {"master", "exp_avg", "exp_avg_sq", "average", "anchor"}

    # 2 -> 1, and what the single rank then writes, before it trains, is read by 2 again: the very same numbers.
    fewer = run(1, iterations=[1], load="two", save="one")
    close(fewer, unbroken)
    more = run(2, iterations=[1], load="one")
    assert more["history"][0] == unbroken["history"][1]
    assert all(torch.equal(more["weights"][n], t) for n, t in unbroken["weights"].items())


def close(resumed: dict[str, Any], unbroken: dict[str, Any]) -> None:
    expected, got = unbroken["history"][1], resumed["history"][0]
    for key in ("policy/loss", "policy/grad_norm", "kl/anchor", "kl/weight", "policy/learning_rate", "policy/updates"):
        assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert abs(got["policy/loss"] - expected["policy/loss"]) < 1e-5
    for part in ("weights", "average"):
        assert set(resumed[part]) == set(unbroken[part])
        for name, tensor in unbroken[part].items():
            torch.testing.assert_close(resumed[part][name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n} {m}")


def cut(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    size = -(-whole.numel() // ranks)
    padded = torch.nn.functional.pad(whole, (0, size * ranks - whole.numel()))
    return list(padded.split(size))


@given(numel=st.integers(1, 40), before=st.integers(1, 7), after=st.integers(1, 7))
def test_pieces_are_cut_anew_for_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, numel: int, before: int, after: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = torch.arange(1.0, numel + 1)
    for rank, piece in enumerate(cut(whole, before)):
        save_file({"w": piece.clone()}, folder / f"shard_{rank:05d}_of_{before:05d}.safetensors")
    expected = cut(whole, after)
    with Shards(folder, before) as shards:
        for rank, piece in enumerate(expected):
            assert torch.equal(shards.piece("w", numel, piece.numel(), rank), piece)
        with pytest.raises(CheckpointError, match="another model"):
            shards.piece("b", numel, 1, 0)
        with pytest.raises(CheckpointError, match="another model"):
            shards.piece("w", numel + 7, 1, 0)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "shard_00000_of_00002.safetensors")
    with pytest.raises(CheckpointError, match="shard_00001_of_00002"):
        Shards(tmp_path, 2)
