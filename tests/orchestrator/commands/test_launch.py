"""Around a run: its folder, and the cluster that it joins."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from euphonium.config import RunConfig, dump_config, load_config
from euphonium.errors import CheckpointError, ConfigError, PreflightError
from euphonium.generators.described import describe_generator
from orchestrator.commands.cli import run_command
from orchestrator.commands.launch import _learning, plan_start, preflight, prepare_run_dir
from orchestrator.commands.planning import settle_run
from orchestrator.commands.train import train_policy
from orchestrator.pools.ray_session import connect_ray, join_ray
from orchestrator.report.tracking import METRICS_FILE, Tracker
from orchestrator.state.checkpoints import RESOLVED, CheckpointStore, RunState


def begun(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True)
    (config.run_dir / METRICS_FILE).write_text('{"iteration": 0}\n')


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_and_loses_nothing(
    make_config: Callable[..., RunConfig],
) -> None:
    config = make_config("resume=auto")
    begun(config)
    (config.run_dir / "checkpoints" / "step_000002.tmp-1").mkdir(parents=True)
    start = plan_start(config)
    assert start.checkpoint is None
    prepare_run_dir(config, start)
    assert [file.name for file in config.run_dir.iterdir()] == [RESOLVED]
    (aside,) = config.run_dir.parent.glob(f"{config.run_dir.name}.*")
    assert (aside / METRICS_FILE).is_file()


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("resume=auto")
    begun(config)
    (config.run_dir / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="all its checkpoints are damaged"):
        prepare_run_dir(config, plan_start(config))
    assert (config.run_dir / METRICS_FILE).is_file()


def test_guided_steps_without_noise_are_told(make_config: Callable[..., RunConfig]) -> None:
    sampler = (
        "sampler={law: dance, eta: 0.5, num_steps: 4, shift: 1, sde_window: [0, 3], "
        "guidance: {scale: 0.2, window: [1, 4]}}"
    )
    told = preflight(make_config(sampler))["guided but not trained"]
    # All four steps are as long: one of three guided ones is not trained.
    assert told.startswith("3 (33% of the guidance)")
    assert "guided but not trained" not in preflight(make_config(sampler.replace("[1, 4]", "[1, 3]")))
    assert "guided but not trained" not in preflight(make_config("sampler.guidance=null"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_line_shows_its_token_to_a_cluster_that_asks_for_it() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    status = subprocess.run(
        [sys.executable, "-m", "orchestrator", "status"], env={**environment, "RAY_ADDRESS": address},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (status.returncode, status.stderr) == (3, "error: the cluster has no run; it has: none\n")


def committed(config: RunConfig, written: str | None = None) -> Path:
    """A run of this recipe, or of one that is written otherwise, with one checkpoint."""
    store = CheckpointStore(config.run_dir / "checkpoints", 2)
    state = RunState(iteration=2, next_group=4, world_size=2)
    return store.commit(store.begin(2), state, written or dump_config(config)).folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.ema_decay", "optimizer.ema_decay=0.9"),
        ("objective.kl.anchor", "objective.kl={anchor: fixed}"),
        ("objective.kl.anchor", "objective.kl={anchor: moving, previous: k3}"),
    ],
)
@pytest.mark.parametrize("before", [[], ["objective.kl={previous: k3}"]])
def test_what_no_checkpoint_of_the_run_holds_is_not_newly_switched_on(
    make_config: Callable[..., RunConfig], field: str, value: str, before: list[str]
) -> None:
    folder = committed(make_config(*before))
    assert plan_start(make_config(*before, "optimizer.learning_rate=1e-5")).checkpoint is not None
    for resume in ("auto", str(folder)):
        with pytest.raises(ConfigError, match=rf"^{field}: .*step_000002 is of a run that began without it"):
            plan_start(make_config(*before, value, f"resume={resume}"))


def test_a_resumed_run_keeps_what_was_chosen_for_it_and_says_nothing_of_a_change(
    make_config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    written = make_config("rollout.samples_per_pass=auto", "pools.learner.shard=auto")
    began = settle_run(written, None)
    assert (began.rollout.samples_per_pass, began.pools.learner.shard) == (16, "full")
    # As if on GPUs, where the plan had chosen otherwise.
    other = began.model_copy(update={"rollout": began.rollout.model_copy(update={"samples_per_pass": 3})})
    committed(other)
    start = plan_start(written)
    assert settle_run(written, start.checkpoint) == other
    assert not caplog.records
    prepare_run_dir(other, start)
    recorded = load_config(other.run_dir / RESOLVED)
    assert (recorded.rollout.samples_per_pass, set(recorded.planned)) == (3, set(began.planned))
    assert settle_run(recorded, None) == recorded


def test_a_run_from_before_a_field_of_the_model_came_in_goes_on(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    written = yaml.safe_load(dump_config(config))
    for field in ("pipeline", "cfg_scale_2", "trained"):
        del written["model"][field]
    committed(config, yaml.safe_dump(written))
    assert plan_start(config).checkpoint is not None
    with pytest.raises(ConfigError, match=r"^resume: .*step_000002 is of a run with model: "):
        plan_start(config.model_copy(update={"model": config.model.model_copy(update={"height": 64})}))


def test_what_a_run_had_may_stay_change_or_go(make_config: Callable[..., RunConfig]) -> None:
    committed(make_config("optimizer.ema_decay=0.9", "objective.kl={anchor: fixed}"))
    for after in (["optimizer.ema_decay=0.5", "objective.kl={anchor: moving}"], ["optimizer.ema_decay=0"]):
        assert plan_start(make_config(*after)).checkpoint is not None


def test_a_run_goes_on_with_its_noise_levels_only(make_config: Callable[..., RunConfig]) -> None:
    committed(make_config("sampler.grid=linear", "sampler.shift=2.0"))
    assert plan_start(make_config("sampler.shift=2.0")).checkpoint is not None
    for other in (["sampler.shift=2.5"], ["sampler.shift=null", "sampler.grid=pipeline"]):
        with pytest.raises(ConfigError, match=r"^sampler\.grid and sampler\.shift: .*step_000002 .*other noise levels"):
            plan_start(make_config(*other))
    with pytest.raises(ConfigError, match=r"set sampler\.grid=linear sampler\.shift=2\.0 to go on"):
        plan_start(make_config("sampler.shift=null", "sampler.grid=pipeline"))
    # The same levels by another name.
    assert plan_start(make_config("sampler.grid=pipeline", "sampler.shift=2.0")).checkpoint is not None


@pytest.mark.parametrize(("shift", "same"), [(3.0, True), (2.0, False)])
def test_a_run_of_an_earlier_version_had_the_linear_grid(
    make_config: Callable[..., RunConfig], shift: float, same: bool
) -> None:
    written = yaml.safe_load(dump_config(make_config(f"sampler.shift={shift}")))
    del written["sampler"]["grid"]
    committed(make_config(), yaml.safe_dump(written))
    # That of the embedded generator's pipeline is the linear one with shift 3.
    config = make_config("sampler.shift=null", "sampler.grid=pipeline")
    if same:
        assert plan_start(config).checkpoint is not None
    else:
        with pytest.raises(ConfigError, match=r"set sampler\.grid=linear sampler\.shift=2\.0"):
            plan_start(config)
    assert plan_start(make_config(f"sampler.shift={shift}")).checkpoint is not None


def test_looking_changes_nothing(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("resume=never")
    begun(config)
    before = sorted(config.run_dir.parent.rglob("*"))
    assert plan_start(config).moves_aside
    assert sorted(config.run_dir.parent.rglob("*")) == before


@pytest.mark.parametrize(("override", "trained"), [("advantage.best_of=null", 24), ("advantage.best_of=1", 16)])
def test_the_plan_counts_the_samples_that_are_trained(
    make_config: Callable[..., RunConfig], override: str, trained: int
) -> None:
    plan = preflight(make_config(override))
    # Two prompts, four steps, three samples or the best and the worst of them; all of them are stored.
    assert plan["trained transitions per iteration"] == trained
    assert plan["without a pass of the network"] == "those of samples whose advantage is 0"
    assert plan["the learner begins"].startswith("with the first groups")
    assert plan["trajectory bytes per iteration"] == preflight(make_config())["trajectory bytes per iteration"]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("advantage.scope=global", "advantage.scope: global"),
        ("rollout.max_staleness=1", "rollout.max_staleness"),
        ("pools.rollout.sleep=true", "take turns"),
        ("rollout.stream=false", "rollout.stream"),
        ("rollout.prompts_per_iteration=1", "one group"),
    ],
)
def test_why_the_learner_waits_for_all_groups_is_said(
    make_config: Callable[..., RunConfig], override: str, reason: str
) -> None:
    config = make_config(override)
    assert reason in config.waits_for_all_groups
    assert (
        _learning(config)["the learner begins"]
        == f"when all groups of an iteration are there ({config.waits_for_all_groups})"
    )
    penalised = make_config("objective.kl={anchor: fixed}")
    assert _learning(penalised)["without a pass of the network"].startswith("none")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts.train=videos.csv", "prompts.train"),
        ("rewards.outcome.0.type=sprite_icno", "did you mean"),
        ("output_dir=/dev/null", "output_dir"),
    ],
)
def test_quick_checks_come_before_a_model_is_downloaded(
    make_config: Callable[..., RunConfig], override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(make_config("model.path=someone/generator", override))


def test_variables_of_other_projects_are_refused_by_train_as_by_validate(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config()
    monkeypatch.setenv("PROCESS_REWARD_ADVANTAGE_COEF", "1.0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"PROCESS_REWARD_ADVANTAGE_COEF=1.0 is rewards.process.weight here"):
        train_policy(config, print, verbose=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("size", [["model.frames=99999999"], ["model.height=4194304", "model.width=32768"]])
def test_a_size_that_no_process_can_hold_is_refused(make_config: Callable[..., RunConfig], size: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.frames.* takes \d+ GiB, and no process can hold more than 1024"):
        preflight(make_config(*size))


def test_reuse_needs_a_network_that_has_a_cache(make_config: Callable[..., RunConfig]) -> None:
    reuse = ("rollout.reuse_below=0.1", "evaluation.reuse_below=0.1", "sampler.sde_window=[0, 2]")
    assert "generator" in preflight(make_config(*reuse))
    published = ("model.path=stabilityai/stable-diffusion-3.5-medium", "model.frames=1", "rewards.process=null")
    config = make_config(*published, "sampler.guidance=null", *reuse)
    with pytest.raises(ConfigError, match=r"^rollout\.reuse_below and evaluation\.reuse_below: .*leave"):
        preflight(config, describe_generator(config.model))


def test_best_of_needs_an_outcome_reward_to_rank_by(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"advantage\.best_of chooses by outcome advantages"):
        make_config("advantage.mode=process", "advantage.best_of=1")


def test_a_port_that_is_taken_is_named(make_config: Callable[..., RunConfig]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = make_config(f"metrics.prometheus_port={taken.getsockname()[1]}")
        config.run_dir.mkdir(parents=True)
        with pytest.raises(PreflightError, match=r"metrics\.prometheus_port: .*Address already in use"):
            Tracker(config, 0)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", ["train", "status"])
def test_a_cluster_that_does_not_answer_ends_the_command(
    make_config: Callable[..., RunConfig], tmp_path: Path, silent: int, command: str,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_config()
    address = f"127.0.0.1:{silent if command == 'train' else 1}"
    arguments = [command, str(tmp_path / "recipe.yaml")] if command == "train" else [command]
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("orchestrator.pools.ray_session.REACH_TIMEOUT_S", 2.0)
    began = time.monotonic()
    status = run_command(arguments)
    assert time.monotonic() - began < 30
    out, err = capfd.readouterr()
    assert (status, out) == (3, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: RAY_ADDRESS: no Ray cluster answers at {address} (")
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_has_ended_but_left_its_address_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked: list[object] = []
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options["address"]))
    connect_ray("euphonium-x", verbose=False)
    assert asked == ["local"]
    monkeypatch.setattr("orchestrator.pools.ray_session._clusters_here", lambda: ["127.0.0.1:2"])
    with pytest.raises(PreflightError, match="no Ray cluster is running"):
        join_ray()


def test_ray_that_does_not_start_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PreflightError, match=r"Ray did not start .*timed out during startup. This could") as refused:
        connect_ray("euphonium-x", verbose=False)
    assert "\n" not in str(refused.value)
