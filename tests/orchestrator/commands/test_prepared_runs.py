"""Runs whose prompts are encoded already: the same numbers to the last bit, and no text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.rollout import RolloutWorker
from euphonium.config import OrmConfig, PrmConfig, RunConfig, dump_config
from euphonium.errors import ConfigError
from euphonium.generators.hunyuan_video import HunyuanVideo
from euphonium.rewards.process import LocalRewards, ProcessRewardModel
from euphonium.wire.records import GroupTask
from orchestrator.commands.cli import run_command
from orchestrator.commands.evaluate import evaluate_model
from orchestrator.commands.launch import preflight
from orchestrator.commands.reward_checks import check_prm
from orchestrator.commands.train_prm import train_prm
from orchestrator.evaluation import evaluation_set
from orchestrator.generation.policies import open_policy
from orchestrator.generation.scoring import Asked
from orchestrator.groups.prompts import read_prompts
from orchestrator.state.checkpoints import Checkpoint, RunState
from tests.euphonium.generators.stores import store_of
from tests.orchestrator.commands.test_train_prm import EMBEDDED, drawn
from tests.process import Process

CPU = torch.device("cpu")
MakeConfig = Callable[..., RunConfig]


def all_prompts(config: RunConfig) -> list[str]:
    prompts = config.prompts
    return [text for file in (prompts.train, prompts.evaluation) for text in read_prompts(file, "f")]


@pytest.fixture
def prepared(make_config: MakeConfig, tmp_path: Path) -> tuple[RunConfig, RunConfig]:
    """A recipe that encodes its prompts, and one that reads them."""
    plain = make_config()
    store = store_of(tmp_path / "store", plain.model, all_prompts(plain))
    return plain, make_config(f"prompts.embeddings={store}")


def refuse_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing in this process load a text encoder any more."""

    def refuse(*_: object) -> None:
        raise AssertionError("a text encoder is loaded")

    monkeypatch.setattr(HunyuanVideo, "load_prompt_encoder", refuse)


def test_rollouts_and_evaluations_are_the_same_to_the_last_bit(
    prepared: tuple[RunConfig, RunConfig], tiny_prm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, stored = prepared
    expected = RolloutWorker(plain, CPU)
    refuse_encoders(monkeypatch)
    judge = ProcessRewardModel.load(tiny_prm, plain.model)
    found = RolloutWorker(stored, CPU)
    for number, prompt in enumerate(read_prompts(plain.prompts.train, "f")):
        task = GroupTask(group_id=number, prompt=prompt, seed=number)
        (_, one, payload), (_, other, read) = (
            worker.generate(task, lambda prompt, table, _: LocalRewards(judge, prompt, table.sigmas))
            for worker in (expected, found)
        )
        assert np.array_equal(one, other)
        assert np.array_equal(payload.log_probs, read.log_probs)
        assert payload.conditioning.keys() == read.conditioning.keys()
        for name, array in payload.conditioning.items():
            assert array.dtype == read.conditioning[name].dtype
            assert np.array_equal(array, read.conditioning[name])
    prompts, seeds = evaluation_set(plain)
    assert np.array_equal(expected.evaluate(prompts, seeds), found.evaluate(prompts, seeds))


def test_a_run_says_where_its_prompts_come_from(
    prepared: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain, stored = prepared
    refuse_encoders(monkeypatch)
    assert "text encoders" not in preflight(plain)
    assert preflight(stored)["text encoders"] == f"none: 4 prompts are read from {tmp_path / 'store'}"
    (tmp_path / "stored.yaml").write_text(dump_config(stored))
    assert run_command(["validate", str(tmp_path / "stored.yaml")]) == 0
    assert "# text encoders " in capfd.readouterr().out


def test_prompts_that_are_lacking_or_of_others_end_it_before_it_starts(
    prepared: tuple[RunConfig, RunConfig], tmp_path: Path, make_config: MakeConfig
) -> None:
    _, stored = prepared
    (tmp_path / "train.txt").write_text("a red car moving left on a white background\na red fish\n")
    with pytest.raises(ConfigError, match=r"lacks 1 of 4 prompts: 'a red fish'; add what is lacking: euphonium prep"):
        preflight(stored)
    with pytest.raises(ConfigError, match="max_prompt_tokens 16 instead of 12"):
        preflight(make_config(f"prompts.embeddings={tmp_path / 'store'}", "model.max_prompt_tokens=12"))
    with pytest.raises(ConfigError, match=r"^prompts\.embeddings: there is no "):
        preflight(make_config("prompts.embeddings=nowhere"))
    for shard in (tmp_path / "store").glob("prompts-*"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ConfigError, match="1 of 1 shards are missing, cut or damaged"):
        preflight(make_config(f"prompts.embeddings={tmp_path / 'store'}"))
    assert not (tmp_path / "runs").exists()


def test_prompts_that_are_cut_are_told_once(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    assert "prompts that are cut" not in preflight(config)
    (tmp_path / "train.txt").write_text("a red car " * 9)
    assert preflight(config)["prompts that are cut"].startswith("1 of 3 are cut to 16 tokens; the longest has 28: ")
    assert len([message for message in caplog.messages if message.startswith("prompts: 1 of 3 are cut")]) == 1


def test_drawing_and_evaluating_read_them_too(
    prepared: tuple[RunConfig, RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, stored = prepared
    refuse_encoders(monkeypatch)
    checkpoint = Checkpoint(tmp_path, RunState(iteration=1, next_group=2, world_size=1))
    opened = [f"orchestrator.generation.{module}.open_checkpoint" for module in ("models", "policies")]
    policies = [f"orchestrator.generation.{module}.open_policy" for module in ("models", "policies")]
    for place in opened:
        monkeypatch.setattr(place, lambda _: (checkpoint, stored))
    for place in policies:
        monkeypatch.setattr(place, lambda c, config, **_: open_policy(c, config, base=True))
    assert evaluate_model(tmp_path, Asked(), base=True)["prompts"] == 2
    known = read_prompts(stored.prompts.train, "f")[0]
    command = ["generate", str(tmp_path), "--steps", "1", "-o"]
    assert run_command([*command, str(tmp_path / "clips"), "-p", known]) == 0
    assert (tmp_path / "clips" / "0000-0.gif").is_file()
    capfd.readouterr()
    assert run_command([*command, str(tmp_path / "other"), "-p", "a pink whale"]) == 2
    message = "lacks 1 of 1 prompts: 'a pink whale'; add what is lacking: euphonium preprocess PROMPTS.txt --model"
    assert message in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_process_reward_model_is_trained_on_the_same_numbers(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_recipe_file(tmp_path)
    plain = drawn(tmp_path / "plain", run)
    store = store_of(tmp_path / "store", plain.model, all_prompts(run))
    prompts = run.prompts.model_copy(update={"embeddings": store})
    accuracy = train_prm(plain, print)
    refuse_encoders(monkeypatch)
    assert train_prm(drawn(tmp_path / "stored", run, prompts=prompts.model_dump()), print) == accuracy
    for part in ("train", "held_out"):
        one, other = (tmp_path / name / "runs" / "prm" / "data" / part for name in ("plain", "stored"))
        assert np.array_equal(np.load(one / "latents.npy"), np.load(other / "latents.npy"))
        expected, found = (load_file(folder / "conditioning.safetensors") for folder in (one, other))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_preferences_read_them_too(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.zeros((9, 32, 32, 3), np.uint8))
    lines = [json.dumps({"prompt": p, "winner": "a.npy", "loser": "b.npy"}) for p in ("a red car", "a blue fish")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    shared = {
        "name": "training", "output_dir": tmp_path / "runs", "target": tmp_path / "model", "optimizer": {"updates": 1},
        "preferences": {"train": tmp_path / "p.jsonl", "held_out_fraction": 0.5, "embeddings": tmp_path / "store"},
    }  # fmt: skip
    config = PrmConfig.model_validate(shared | {"model": EMBEDDED, "blocks": 1})
    store_of(tmp_path / "store", config.model, ["a red car"])
    with pytest.raises(ConfigError, match=r"^preferences\.embeddings: .* lacks 1 of 2 prompts: 'a blue fish'; add"):
        check_prm(config)
    # Files of preferences are prompt files, too.
    arguments = ["preprocess", str(tmp_path / "p.jsonl"), "--model", EMBEDDED["path"], "--max-prompt-tokens", "16"]
    assert run_command([*arguments, "--output", str(tmp_path / "store")]) == 0
    assert check_prm(config)["text encoders"].startswith("none: 2 prompts are read from")
    with pytest.raises(ValueError, match="an outcome reward model reads the texts; leave them out"):
        OrmConfig.model_validate(shared | {"model": {"path": "x"}})


@pytest.mark.ray
@pytest.mark.slow
def test_a_whole_run_gives_the_same_numbers(tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path) -> None:
    common = ("iterations=1", "checkpoint.every=1", "evaluation.every=1", "evaluation.clips=0", "rewards.process=null",
              "sampler.guidance=null", "pools.rollout.num_actors=1", "pools.learner.num_workers=1",
              "pools.orm.merge=false", "objective.kind=standard")  # fmt: skip
    recipe, numbers = tmp_path / "resolved.yaml", []
    for name in ("plain", "stored"):
        config = tiny_recipe_file(tmp_path, f"name={name}", *common)
        if name == "stored":
            store = store_of(tmp_path / "store", config.model, all_prompts(config))
            config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"embeddings": store})})
        recipe.write_text(dump_config(config))
        process = Process("train", str(recipe))
        assert process.finish() == 0, process.output
        records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        numbers.append([
            {key: value for key, value in record.items() if key.startswith(("eval/", "reward/", "policy/"))}
            for record in records
        ])  # fmt: skip
    assert len(numbers[0][1]) > 10
    assert numbers[0] == numbers[1]
