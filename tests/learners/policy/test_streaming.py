"""Two real ranks begin with the first groups of an iteration, or wait for all: the same weights to the last bit."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from euphonium.config import RunConfig, dump_config
from euphonium.wire.tracing import folder_of, tracing
from tests.ranks import run_ranks

OVERRIDES = (
    "rollout.prompts_per_iteration=3", "pools.learner.rows_per_micro_batch=2", "optimizer.learning_rate=1e-3",
    "optimizer.weight_decay=0.01", "objective.clip_range=0.5", "objective.ratio_tolerance=10",
    "objective.ratio_tolerance_p99=10", "iterations=4", "profile.iterations=[1]",
)  # fmt: skip
WAYS = {
    "one update": (),
    "two updates, and the previous policy": (
        "objective.updates_per_iteration=2", "objective.ratio_normalisation=true", "objective.old_log_probs=learner",
    ),
}  # fmt: skip


# Streams with two updates are also those of tests/learners/policy/test_noised_on_ranks.py.
QUICK = "one update"


@pytest.fixture(
    scope="module",
    params=[pytest.param(way, marks=() if name == QUICK else pytest.mark.slow) for name, way in WAYS.items()],
    ids=WAYS,
)
def results(
    request: pytest.FixtureRequest, tiny_recipe_file: Callable[..., RunConfig], drawn: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:  # fmt: skip
    folder = tmp_path_factory.mktemp("streaming")
    config = tiny_recipe_file(folder, *OVERRIDES, *request.param)
    (folder / "recipe.yaml").write_text(dump_config(config))
    (folder / "groups.pkl").write_bytes(pickle.dumps(drawn(config)))
    with tracing(config, 1):
        run_ranks(2, Path(__file__).with_name("streaming_worker.py"), folder, timeout_s=400)
    assert {file.name for file in folder_of(config, 1).iterdir()} == {"learner-0.json.gz", "learner-1.json.gz"}
    found: dict[str, Any] = torch.load(folder / "rank_0.pt", weights_only=False)
    return found


def weights(results: dict[str, Any], way: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = results[way]["weights"]
    assert found
    return found


def test_a_streamed_batch_gives_the_weights_of_a_whole_one_to_the_last_bit(results: dict[str, Any]) -> None:
    one, other = weights(results, "whole"), weights(results, "streamed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results["whole"]["history"] == results["streamed"]["history"]


def test_a_lost_group_makes_the_update_begin_anew(results: dict[str, Any]) -> None:
    one, other = weights(results, "without it"), weights(results, "with a loss")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results["without it"]["history"] == results["with a loss"]["history"]
    lost = weights(results, "whole")
    assert not all(torch.equal(one[name], lost[name]) for name in one)


def test_rows_without_an_advantage_change_nothing_by_their_absence(results: dict[str, Any]) -> None:
    one, other = weights(results, "zero rows"), weights(results, "zero rows skipped")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-6, atol=1e-6)
    computed = [results[way]["history"][-1]["policy/transitions"] for way in ("zero rows skipped", "zero rows")]
    assert computed[0] < computed[1]


def test_a_batch_without_any_advantage_is_an_update_without_a_gradient(results: dict[str, Any]) -> None:
    one, other = weights(results, "zero batch"), weights(results, "zero batch skipped")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results["zero batch skipped"]["history"][-1]["policy/grad_norm"] == 0
    before = weights(results, "whole")
    assert not all(torch.equal(one[name], before[name]) for name in one), "weights decay, and momentum moves them"
