"""Which steps of a group are stochastic and which are trained: windows of groups, a trained range, final rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.wire.records import GroupInfo, GroupPayload, GroupTask, TrainingGroup
from learners.policy.batching import MicroBatch, load_rows
from learners.policy.objective import evaluate_objective
from orchestrator.commands.launch import preflight
from orchestrator.groups.credit import advantages

CPU = torch.device("cpu")
PROMPT = "a red car moving left on a white background"
MakeConfig = Callable[..., RunConfig]
ONE_STEP = (
    "sampler.sde_window={kind: group, size: 1, allowed: [0, 3]}", "sampler.guidance=null", "rewards.process=null",
    "sampler.law=flow_grpo", "objective.step_weights=rectified",
)  # fmt: skip


def drawn(config: RunConfig, ordinal: int = 0) -> tuple[RolloutWorker, GroupInfo, np.ndarray, GroupPayload]:
    worker = RolloutWorker(config, CPU)
    source = None
    if config.rewards.process is not None:
        model = ProcessRewardModel.load(Path(config.rewards.process.path), config.model)

        def source(conditioning, table, velocity):  # type: ignore[no-untyped-def]
            return LocalRewards(model, conditioning, table.sigmas)

    return worker, *worker.generate(GroupTask(group_id=ordinal, prompt=PROMPT, seed=11), source)


def test_every_group_is_stochastic_at_a_step_of_its_own(make_config: MakeConfig) -> None:
    config = make_config(*ONE_STEP)
    seen = set()
    for ordinal in range(6):
        worker, info, latents, payload = drawn(config, ordinal)
        steps = set(payload.steps.flatten().tolist())
        seen |= steps
        assert payload.steps.shape == (3, 1)
        assert len(steps) == 1, "the same step for all samples of a prompt"
        # The samples share everything up to their step: one state to leave, three to reach.
        assert len(payload.states) == 4
        assert len(set(info.rows.flatten().tolist())) == 1
        assert len({tuple(sample.flatten().tolist()) for sample in latents}) == 3
        # The learner scores by the table of all groups, and finds the same probabilities.
        assert info.fingerprint == worker.family.step_table(config.sampler).fingerprint()
        group = TrainingGroup(info=info, advantages=np.ones((1, 3, 4), np.float32), samples=np.arange(3), counted=3)
        rows = load_rows(MicroBatch(group=0, begin=0, end=group.states, weight=1.0), group, payload, CPU)
        value = evaluate_objective(
            config.objective, worker.table(), partial(worker.family.velocity, worker.transformer), rows
        )
        assert float((value.ratio - 1).abs().max()) < 1e-5
    assert seen <= {0, 1, 2}
    assert len(seen) > 1


def test_a_plan_of_such_a_run_counts_one_step_a_group(make_config: MakeConfig) -> None:
    config = make_config(*ONE_STEP)
    plan = preflight(config)
    assert plan["trained transitions per iteration"] == 2 * 3
    assert plan["sampler"] == "flow_grpo, 4 steps, stochastic 1 of 0-2, drawn for every group, guided none"


def test_a_trained_range_changes_nothing_of_the_sampler(make_config: MakeConfig) -> None:
    whole = drawn(make_config("sampler.guidance=null", "rewards.process=null"))
    config = make_config("sampler.guidance=null", "rewards.process=null", "objective.trained_steps=[1, 3]")
    part = drawn(config)
    assert np.array_equal(whole[2], part[2]), "steps that are not trained keep their noise"
    assert set(part[3].steps.flatten().tolist()) == {1, 2}
    assert np.array_equal(part[3].log_probs, whole[3].log_probs[:, 1:3])
    for i in range(3):
        for j, k in enumerate((1, 2)):
            for rows in ("rows", "next_rows"):
                one, other = getattr(part[3], rows)[i, j], getattr(whole[3], rows)[i, k]
                assert np.array_equal(part[3].states[one], whole[3].states[other])
    assert preflight(config)["trained transitions per iteration"] == 2 * 3 * 2


def test_every_nth_step_may_be_trained_and_the_others_keep_their_noise(make_config: MakeConfig) -> None:
    plain = ("sampler.guidance=null", "rewards.process=null", "objective.trained_every=2")
    whole = drawn(make_config(*plain[:2]))
    for overrides, steps in ((plain, [0, 2]), ([*plain, "objective.trained_steps=[1, 4]"], [1, 3])):
        config = make_config(*overrides)
        part = drawn(config)
        assert np.array_equal(whole[2], part[2])
        assert part[3].steps.tolist() == [steps] * 3
        assert np.array_equal(part[3].log_probs, whole[3].log_probs[:, steps])
        assert preflight(config)["trained transitions per iteration"] == 2 * 3 * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.trained_steps=[2, 2]"], "is empty"),
        (["objective.trained_steps=[2, 9]"], "ends after the last of 4 steps"),
        (["objective.trained_steps=[1, 2]", *ONE_STEP], "sde_window moves"),
    ],
)
def test_impossible_ranges_are_refused(overrides: list[str], message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_a_range_without_noise_is_refused_before_anything_starts(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"none of the steps \(3, 4\) has noise"):
        preflight(make_config("objective.trained_steps=[3, 4]", "sampler.sde_window=[0, 3]"))


def test_the_process_reward_of_finished_samples_is_an_outcome_reward(make_config: MakeConfig) -> None:
    config = make_config(
        "rewards.process.outcome_weight=0.5", "advantage.mode=outcome", "sampler.guidance=null", "advantage.clip=100"
    )
    worker, info, latents, _ = drawn(config)
    assert info.process_rewards is None or not info.process_rewards.any(), "no other state is scored"
    process = config.rewards.process
    assert process is not None
    model = ProcessRewardModel.load(Path(process.path), config.model)
    source = LocalRewards(model, worker.conditioning(PROMPT), worker.table().sigmas)
    wanted, _ = source.submit(4, torch.from_numpy(latents), with_gradient=False).result()
    assert info.final_rewards is not None
    np.testing.assert_allclose(info.final_rewards, wanted.numpy(), atol=1e-5)
    scores = {reward.name: np.array([0.0, 1.0, 2.0], np.float32) for reward in config.rewards.outcome}
    (found,) = advantages(config, [info], [scores])
    outcome = 2.5 * np.array([-1.0, 0.0, 1.0])
    standardised = (info.final_rewards - info.final_rewards.mean()) / info.final_rewards.std(ddof=1)
    np.testing.assert_allclose(found.values[0, :, 0].numpy(), outcome + 0.5 * standardised, atol=1e-4)


def test_a_run_may_train_on_it_alone(make_config: MakeConfig) -> None:
    alone = [f"rewards.outcome.{i}.weight=0" for i in range(3)]
    with pytest.raises(ConfigError, match=r"all rewards that advantage\.mode lets in have weight 0"):
        make_config(*alone, "advantage.mode=outcome")
    assert make_config(*alone, "advantage.mode=outcome", "rewards.process.outcome_weight=1").scores_final_states
    assert not make_config("advantage.mode=process", "rewards.process.outcome_weight=1").scores_final_states


def test_a_controller_that_never_leaves_its_warm_up_is_told(make_config: MakeConfig) -> None:
    kl = "objective.kl={anchor: fixed, controller: {target: 0.01, warmup_updates: %d}}"
    assert "its feedback never acts" in preflight(make_config(kl % 2))["KL controller"]
    assert "KL controller" not in preflight(make_config(kl % 1))
    # Without feedback there is nothing that could not act: the weight rises, and that is all.
    alone = make_config("objective.kl={anchor: fixed, controller: {maximum: 1.0e-6, warmup_updates: 2}}")
    assert "KL controller" not in preflight(alone)
