"""Finished samples that are noised again: at which levels, with which noise, and how they reach the learner."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from actors.rollout import RolloutWorker
from actors.training_rows import noised_rows, stored_states, trained_steps
from euphonium.config import RunConfig
from euphonium.wire.records import GroupPayload, GroupTask
from learners.policy.batching import load_rows, plan_updates
from tests.learners.groups import training_group

NFT = (
    "objective.kind=nft", "sampler.law=ode", "sampler.eta=null", "sampler.shared_noise=false", "sampler.guidance=null",
    "rewards.process=null", "objective.timestep_fraction=0.5", "sampler.num_steps=6", "rollout.group_size=4",
)  # fmt: skip
DPO = (
    *NFT, "objective.kind=dpo", "advantage.best_of=1", "objective.kl.anchor=fixed",
    "pools.learner.rows_per_micro_batch=4",
)  # fmt: skip
TASK = GroupTask(group_id=3, prompt="a red car moving left on a white background", seed=7)


@pytest.fixture(scope="module", params=[NFT, DPO], ids=["nft", "dpo"])
def config(
    request: pytest.FixtureRequest, tiny_recipe_file: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    return tiny_recipe_file(tmp_path_factory.mktemp("noised"), *request.param)


@pytest.fixture(scope="module")
def worker(config: RunConfig) -> RolloutWorker:
    return RolloutWorker(config, torch.device("cpu"))


def drawn(worker: RolloutWorker, task: GroupTask = TASK) -> tuple[np.ndarray, GroupPayload]:
    _, samples, payload = worker.generate(task, None)
    return samples, payload


def test_rows_are_the_samples_at_noise_levels_of_the_grid(config: RunConfig, worker: RolloutWorker) -> None:
    samples, payload = drawn(worker)
    size, levels = payload.steps.shape
    assert (size, levels) == (4, 3)
    assert len(payload.states) == size * (levels + 1)
    sigmas = worker.table().sigmas
    noises = np.empty((size, levels, *samples.shape[1:]))
    for i in range(size):
        assert sorted(set(payload.steps[i])) == payload.steps[i].tolist()
        for j in range(levels):
            sigma = float(sigmas[payload.steps[i, j]])
            x, data = payload.states[payload.rows[i, j]], payload.states[payload.next_rows[i, j]]
            np.testing.assert_array_equal(data, samples[i])
            noises[i, j] = (x - (1 - sigma) * data) / sigma
    assert abs(noises.mean()) < 0.05
    assert abs(noises.std() - 1) < 0.05
    # Members of a pair have the same levels and the same noise, so that they are told apart by themselves alone.
    alike = config.objective.kind == "dpo"
    assert (len({tuple(row) for row in payload.steps.tolist()}) == 1) == alike
    assert np.allclose(noises[0], noises[1], atol=1e-3) == alike


def test_the_same_task_gives_the_same_rows_and_another_one_others(worker: RolloutWorker) -> None:
    first, again = drawn(worker)[1], drawn(worker)[1]
    other = drawn(worker, GroupTask(group_id=4, prompt=TASK.prompt, seed=8))[1]
    for name in ("states", "rows", "next_rows", "steps"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.states, other.states)


def test_the_plan_counts_what_is_stored(config: RunConfig, worker: RolloutWorker) -> None:
    payload = drawn(worker)[1]
    rows, count = stored_states(config, worker.table(), trained_steps(config, worker.table(), 0))
    assert count == len(payload.states)
    np.testing.assert_array_equal(rows.numpy(), payload.rows)


def test_every_row_is_in_one_micro_batch_and_pairs_stay_together(config: RunConfig, worker: RolloutWorker) -> None:
    payload = drawn(worker)[1]
    chosen = np.array([1, 3]) if config.objective.kind == "dpo" else np.arange(4)
    advantages = np.repeat(np.arange(4.0, dtype=np.float32)[None, :, None], 6, axis=2)
    group = training_group(payload, advantages, samples=chosen)
    (update,) = plan_updates([(group.rows, group.states)], 1, 4, world_size=2)
    found = []
    for batch in (batch for share in update for batch in share if batch.weight > 0):
        rows = load_rows(batch, group, payload, torch.device("cpu"))
        assert rows.of is not None
        assert rows.of.tolist() == list(range(len(rows.states)))
        found += list(zip(rows.advantages[0].tolist(), rows.steps.tolist(), strict=True))
        for x, data, sample, k in zip(rows.states, rows.next_states, rows.advantages[0], rows.steps, strict=True):
            column = payload.steps[int(sample)].tolist().index(int(k))
            np.testing.assert_array_equal(x, payload.states[payload.rows[int(sample), column]])
            np.testing.assert_array_equal(data, payload.states[payload.next_rows[int(sample), column]])
        if config.objective.kind == "dpo":
            assert rows.advantages[0].view(-1, 2).tolist() == [[1.0, 3.0]] * (len(rows.steps) // 2)
            assert all(len(set(pair)) == 1 for pair in rows.steps.view(-1, 2).tolist())
    assert sorted(found) == sorted((float(i), int(k)) for i in chosen for k in payload.steps[i])


def test_only_some_levels_may_be_trained(config: RunConfig, worker: RolloutWorker) -> None:
    objective = config.objective.model_copy(update={"trained_steps": (1, 3), "timestep_fraction": 1.0})
    steps = trained_steps(config.model_copy(update={"objective": objective}), worker.table(), 0)
    assert steps.tolist() == [[1, 2]] * 4


def test_states_and_samples_have_places_of_their_own() -> None:
    rows, data = noised_rows(torch.zeros(3, 4, dtype=torch.int64))
    assert sorted(rows.flatten().tolist()) == list(range(12))
    assert data.tolist() == [[12] * 4, [13] * 4, [14] * 4]
