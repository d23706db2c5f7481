"""What is evaluated, who draws which share of it, and what is left on disk."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from euphonium.config import OutcomeRewardConfig, RunConfig
from euphonium.errors import ConfigError, RewardError
from euphonium.generators.registry import open_generator
from orchestrator.evaluation import Evaluator, SampleFolder, evaluation_metrics, evaluation_set
from orchestrator.report.metrics import find_metric
from orchestrator.report.pictures import enlarge
from orchestrator.report.tracking import Progress, Tracker
from reward_servers.orm import OrmScorer

MakeConfig = Callable[..., RunConfig]


class Rollouts:
    """Stands where the pools are: a sample's latent is its prompt's length and the low digits of its seed."""

    def __init__(self, rollout_actors: int, orm_servers: int = 1) -> None:
        self.rollout_actors, self.orm_servers = rollout_actors, orm_servers
        self.scored: list[list[str]] = []
        self.asked: list[tuple[list[str], list[int], str]] = []
        self.left = 0
        self.failing: tuple[str, ...] = ()
        self.shown: list[np.ndarray] = []

    async def samples(self, prompts: Sequence[str], seeds: Sequence[int], kind: str) -> np.ndarray:
        self.asked.append((list(prompts), list(seeds), kind))
        # The last share that is asked for comes first.
        self.left += 1
        for _ in range(10 - self.left):
            await asyncio.sleep(0)
        return latents_of(prompts, seeds)

    async def scores(
        self, latents: np.ndarray, prompts: Sequence[str], _: float, optional: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], float]:
        if failed := set(self.failing) - set(optional):
            raise RewardError("judge down", sorted(failed))
        assert [int(length) for length in latents[:, 0]] == [len(prompt) for prompt in prompts]
        self.scored.append(list(prompts))
        index = np.array([prompt.count("very") for prompt in prompts], dtype=np.float32)
        scores = {"icon": index, "motion": index**2, "quality": np.ones_like(index)}
        return {name: values for name, values in scores.items() if name not in self.failing}, 0.5

    async def videos(self, latents: np.ndarray, _: float) -> np.ndarray:
        self.shown.append(latents)
        grey = (latents[:, 1] % 256).astype(np.uint8)
        return np.broadcast_to(grey[:, None, None, None, None], (len(latents), 3, 8, 8, 3))


def latents_of(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    return np.array([[len(p), s % 1000] for p, s in zip(prompts, seeds, strict=True)], np.float32)


def write_held_out(config: RunConfig, count: int) -> list[str]:
    prompts = ["a red car " + "very " * i + "far away" for i in range(count)]
    config.prompts.evaluation.write_text("\n".join(prompts))
    return prompts


def evaluate(config: RunConfig, rollouts: Rollouts, *iterations: int) -> list[dict[str, float]]:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    service: Any = rollouts
    evaluator = Evaluator(config, service, Tracker(config, 0))

    async def all_of_them() -> list[dict[str, float]]:
        return [await evaluator.evaluate(iteration) for iteration in iterations]

    return asyncio.run(all_of_them())


# --- what is evaluated -----------------------------------------------------------------------------------------


def test_a_held_out_prompt_that_is_trained_on_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    shared = config.prompts.train.read_text().splitlines()[0]
    with config.prompts.evaluation.open("a") as file:
        file.write("\n" + shared)
    with pytest.raises(ConfigError, match=r"prompts\.evaluation: 1 prompts .*must not be trained on") as caught:
        evaluation_set(config)
    assert repr(shared) in str(caught.value)


def test_prompts_are_spread_over_the_file_and_each_comes_with_its_samples(make_config: MakeConfig) -> None:
    config = make_config("evaluation.prompts=3", "evaluation.samples_per_prompt=2")
    held_out = write_held_out(config, 9)
    prompts, seeds = evaluation_set(config)
    assert prompts == [held_out[i] for i in (0, 0, 4, 4, 8, 8)]
    assert len(set(seeds)) == 6, "every sample has noise of its own"
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_noise_is_the_same_in_every_evaluation_whatever_the_run_draws(make_config: MakeConfig) -> None:
    _, seeds = evaluation_set(make_config("seed=1"))
    assert evaluation_set(make_config("seed=2"))[1] == seeds
    assert not set(evaluation_set(make_config("evaluation.seed=8"))[1]) & set(seeds)
    # More samples leave those that there were as they are.
    assert evaluation_set(make_config("evaluation.samples_per_prompt=3"))[1][:2] == seeds


def test_the_total_is_the_mean_weighted_by_the_recipe() -> None:
    rewards = [
        OutcomeRewardConfig(name="a", type="sprite_icon", weight=3.0),
        OutcomeRewardConfig(name="b", type="sprite_motion", weight=1.0),
    ]
    metrics = evaluation_metrics({"b": np.array([4.0, 8.0]), "a": np.array([1.0, 3.0])}, rewards)
    assert metrics == {"eval/b/mean": 6.0, "eval/a/mean": 2.0, "eval/total/mean": (3 * 2 + 6) / 4}


# --- one evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actors", [0, 1, 3, 9])
def test_actors_share_the_samples_and_every_sample_keeps_its_place(make_config: MakeConfig, actors: int) -> None:
    config = make_config("evaluation.prompts=5", "evaluation.clips=5")
    write_held_out(config, 5)
    prompts, seeds = evaluation_set(config)
    rollouts = Rollouts(actors)
    (metrics,) = evaluate(config, rollouts, 0)
    assert len(rollouts.asked) == min(5, max(1, actors))
    assert max(len(p) for p, _, _ in rollouts.asked) - min(len(p) for p, _, _ in rollouts.asked) <= 1
    np.testing.assert_array_equal(rollouts.shown[0], latents_of(prompts, seeds))
    weights = {reward.name: reward.weight for reward in config.rewards.outcome}
    total = (2 * weights["icon"] + 6 * weights["motion"] + weights["quality"]) / sum(weights.values())
    assert metrics.pop("time/evaluation_s") >= 0
    assert metrics == pytest.approx(
        {"eval/icon/mean": 2, "eval/motion/mean": 6, "eval/quality/mean": 1, "eval/total/mean": total}
    )


@pytest.mark.parametrize(("actors", "servers"), [(1, 3), (2, 3), (2, 4), (3, 2), (5, 9), (0, 0)])
def test_all_servers_have_a_part_of_the_samples_and_the_numbers_are_those_of_one(
    make_config: MakeConfig, actors: int, servers: int
) -> None:
    config = make_config("evaluation.prompts=7", "evaluation.clips=3")
    held_out = write_held_out(config, 7)
    alone, sharded = Rollouts(1), Rollouts(actors, servers)
    (expected,), (metrics,) = evaluate(config, alone, 0), evaluate(config, sharded, 0)
    for numbers in (expected, metrics):
        numbers.pop("time/evaluation_s")
    assert metrics == expected
    assert alone.scored == [held_out]
    assert sorted(prompt for part in sharded.scored for prompt in part) == sorted(held_out), "each of them once"
    assert len(sharded.scored) >= min(servers, 7)
    assert max(map(len, sharded.scored)) - min(map(len, sharded.scored)) <= 1
    np.testing.assert_array_equal(alone.shown[0], sharded.shown[0])


@pytest.mark.parametrize(("merge", "within"), [(True, 1e-5), (False, 0)])
def test_real_rewards_of_parts_are_those_of_one_request_without_merging_to_the_last_bit(
    make_config: MakeConfig, *, merge: bool, within: float
) -> None:
    config = make_config("evaluation.prompts=2", "evaluation.samples_per_prompt=4", "evaluation.clips=2",
                         "pools.orm.max_batch=3", f"pools.orm.merge={str(merge).lower()}")  # fmt: skip
    scorer = OrmScorer(config.rewards.outcome, open_generator(config.model), torch.device("cpu"), config.pools.orm)

    class Scored(Rollouts):
        async def samples(self, prompts: Sequence[str], seeds: Sequence[int], kind: str) -> np.ndarray:
            drawn = [np.random.default_rng(seed).standard_normal((16, 5, 4, 4), np.float32) for seed in seeds]
            return np.stack(drawn)

        async def scores(
            self, latents: np.ndarray, prompts: Sequence[str], _: float, optional: Sequence[str]
        ) -> tuple[dict[str, np.ndarray], float]:
            self.scored.append(list(prompts))
            return scorer.score(latents, prompts, optional), 0.0

        async def videos(self, latents: np.ndarray, _: float) -> np.ndarray:
            self.shown.append(scorer.videos(latents))
            return self.shown[-1]

    prompts, seeds = evaluation_set(config)
    latents = asyncio.run(Scored(1).samples(prompts, seeds, "policy"))
    expected = evaluation_metrics(scorer.score(latents, prompts, ()), config.rewards.outcome)
    sharded = Scored(3, 4)
    (metrics,) = evaluate(config, sharded, 0)
    metrics.pop("time/evaluation_s")
    assert metrics == pytest.approx(expected, rel=within, abs=0)
    assert len(sharded.scored) == (6 if merge else 3)
    np.testing.assert_array_equal(sharded.shown[0], scorer.videos(latents[[0, 7]]))


@pytest.mark.parametrize("failing", [False, True])
def test_a_share_is_scored_while_another_one_is_drawn_and_nothing_goes_on_after_a_failure(
    make_config: MakeConfig, *, failing: bool
) -> None:
    config = make_config("evaluation.prompts=4", "evaluation.clips=1")
    held_out = write_held_out(config, 4)
    waited: list[str] = []

    class Late(Rollouts):
        async def samples(self, prompts: Sequence[str], seeds: Sequence[int], kind: str) -> np.ndarray:
            if held_out[1] in prompts:
                try:
                    while len(self.scored) < 2:
                        await asyncio.sleep(0)
                except asyncio.CancelledError:
                    waited.append("given up")
                    raise
                waited.append("drawn last")
            return latents_of(prompts, seeds)

    rollouts = Late(2, 4)
    if failing:
        rollouts.failing = ("icon",)
        config = make_config("rewards.outcome=[{name: icon, type: sprite_icon, on_failure: abort}]",
                             "rewards.process=null", "sampler.guidance=null", "evaluation.prompts=4")  # fmt: skip
        write_held_out(config, 4)
        with pytest.raises(RewardError, match="judge down"):
            evaluate(config, rollouts, 0)
        assert waited == ["given up"]
        return
    evaluate(config, rollouts, 0)
    assert waited == ["drawn last"]
    assert rollouts.scored[:2] == [[held_out[0]], [held_out[2]]]


@pytest.mark.parametrize(("decay", "kinds"), [(0.0, ["policy", "policy"]), (0.9, ["policy", "average"])])
def test_the_average_is_evaluated_once_there_is_one(make_config: MakeConfig, decay: float, kinds: list[str]) -> None:
    rollouts = Rollouts(1)
    evaluate(make_config(f"optimizer.ema_decay={decay}"), rollouts, 0, 2)
    assert [kind for _, _, kind in rollouts.asked] == kinds
    assert rollouts.asked[0][:2] == rollouts.asked[1][:2]


def test_some_samples_are_left_as_clips_before_and_after(make_config: MakeConfig) -> None:
    config = make_config("evaluation.prompts=5", "evaluation.clips=3")
    held_out = write_held_out(config, 5)
    rollouts = Rollouts(2)
    evaluate(config, rollouts, 0, 4)
    samples = config.run_dir / "samples"
    assert sorted(folder.name for folder in samples.iterdir()) == [
        "before_after", "before_after.png", "iteration_000000", "iteration_000004"
    ]  # fmt: skip
    for folder in (samples / "iteration_000000", samples / "iteration_000004"):
        assert sorted(path.name for path in folder.glob("*.gif")) == ["00.gif", "01.gif", "02.gif"]
    _, seeds = evaluation_set(config)
    shown = latents_of(held_out, seeds)[[0, 2, 4]]
    np.testing.assert_array_equal(rollouts.shown[0], shown)
    videos = np.load(samples / "iteration_000000" / "videos.npy")
    np.testing.assert_array_equal(videos[:, 0, 0, 0, 0], shown[:, 1] % 256)
    index = (samples / "iteration_000004" / "index.json").read_text()
    assert '"motion": 16.0' in index, "the scores are those of the samples that are shown"


def test_without_clips_nothing_is_decoded(make_config: MakeConfig) -> None:
    config, rollouts = make_config("evaluation.clips=0"), Rollouts(1)
    (metrics,) = evaluate(config, rollouts, 0)
    assert "eval/total/mean" in metrics
    assert rollouts.shown == []
    assert not (config.run_dir / "samples").exists()


def test_a_clip_shows_what_was_before_on_the_left_and_what_is_after_on_the_right(tmp_path: Any) -> None:
    folder, black, white = SampleFolder(tmp_path), *(np.full((1, 2, 64, 64, 3), v, np.uint8) for v in (0, 255))
    folder.save(0, ["a prompt"], black, {"icon": [0.0]})
    assert not (tmp_path / "before_after").exists()
    folder.save(7, ["a prompt"], white, {"icon": [1.0]})
    clip = np.asarray(Image.open(tmp_path / "before_after" / "00.gif").convert("L"))
    assert clip.shape[1] == enlarge(np.zeros((1, 64, 64 + 2 + 64, 3), np.uint8)).shape[2]
    assert clip[:, :60].max() < 10
    assert clip[:, -60:].min() > 245


def test_a_reward_that_fails_on_a_part_of_the_samples_is_missing_as_if_they_were_scored_at_once(
    make_config: MakeConfig,
) -> None:
    config = make_config("evaluation.prompts=4", "evaluation.clips=2")
    write_held_out(config, 4)

    class Picky(Rollouts):
        async def scores(
            self, latents: np.ndarray, prompts: Sequence[str], _: float, optional: Sequence[str]
        ) -> tuple[dict[str, np.ndarray], float]:
            self.failing = ("motion",) if any(prompt.count("very") == 2 for prompt in prompts) else ()
            return await super().scores(latents, prompts, _, optional)

    (expected,), (metrics,) = evaluate(config, Picky(1), 0), evaluate(config, Picky(2, 4), 0)
    for numbers in (expected, metrics):
        numbers.pop("time/evaluation_s")
    assert metrics == expected
    assert metrics["eval/motion/missing"] == 1
    assert "eval/total/mean" not in metrics


@pytest.mark.parametrize("failing", ["quality", "icon"])
def test_an_evaluation_goes_on_without_a_reward_that_fails(make_config: MakeConfig, failing: str) -> None:
    weights = {"icon": 1, "motion": 2, "quality": 0}
    rewards = ", ".join(f"{{name: {n}, type: sprite_{n}, weight: {w}}}" for n, w in weights.items())
    rollouts = Rollouts(1)
    rollouts.failing = (failing,)
    (metrics,) = evaluate(make_config(f"rewards.outcome=[{rewards}]"), rollouts, 0)
    assert metrics[f"eval/{failing}/missing"] == 1
    assert f"eval/{failing}/mean" not in metrics
    assert all(f"eval/{name}/mean" in metrics for name in weights if name != failing)
    assert ("eval/total/mean" in metrics) == (failing == "quality")
    for key in metrics:
        find_metric(key)


def test_an_evaluation_ends_the_run_where_the_recipe_says_so(make_config: MakeConfig) -> None:
    rollouts = Rollouts(1)
    rollouts.failing = ("icon",)
    config = make_config("rewards.outcome=[{name: icon, type: sprite_icon, on_failure: abort}]", "rewards.process=null",
                         "sampler.guidance=null")  # fmt: skip
    with pytest.raises(RewardError, match="judge down"):
        evaluate(config, rollouts, 0)


def test_without_weights_there_is_no_total() -> None:
    rewards = [OutcomeRewardConfig(name="a", type="sprite_icon", weight=0.0)]
    assert evaluation_metrics({"a": np.array([1.0])}, rewards) == {"eval/a/mean": 1.0}


def test_a_summary_compares_the_rewards_that_both_evaluations_have(capsys: pytest.CaptureFixture[str]) -> None:
    first = {"iteration": 0, "eval/a/mean": 1.0, "eval/b/mean": 2.0, "eval/total/mean": 1.5}
    Progress(2, 0).summary([first, {"iteration": 2, "eval/a/mean": 3.0, "eval/b/missing": 1.0}])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["held-out", "a"]
