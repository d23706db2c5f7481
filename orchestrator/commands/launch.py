"""Around a run: checks before anything starts, the run's folder, and the connection to Ray."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from euphonium.config import RunConfig, dump_config
from euphonium.errors import CheckpointError, ConfigError, PreflightError
from euphonium.wire.deadlines import node_id
from orchestrator.checkpoints import Checkpoint, CheckpointStore, verify
from orchestrator.report.tracking import METRICS_FILE, read_metrics

log = logging.getLogger(__name__)

RESOLVED = "config.resolved.yaml"
LEFTOVERS_TIMEOUT_S = 60.0


def preflight(config: RunConfig) -> dict[str, Any]:
    """Checks everything that can be checked without starting anything.

    Returns:
        The plan of the run, for people to read.

    Raises:
        ConfigError: names the field, and what to do.
    """
    from actors.sampler import select_steps
    from euphonium.generators.generator import images_for
    from euphonium.generators.registry import open_generator
    from euphonium.rewards.registry import build_rewards
    from orchestrator.evaluation import evaluation_set
    from orchestrator.groups.prompts import read_prompts

    family = open_generator(config.model)
    shape = family.latent_shape
    prompts = read_prompts(config.prompts.train, "prompts.train")
    evaluation_set(config)
    images_for(family, config.prompts)
    build_rewards(config.rewards.outcome)
    if config.rewards.process is not None:
        from euphonium.rewards.process import ProcessRewardModel

        ProcessRewardModel.load(Path(config.rewards.process.path), config.model)
    table = family.step_table(config.sampler)
    kept = select_steps(table, 1, config.objective.timestep_fraction, 0).shape[1]
    rollout, pools = config.rollout, config.pools
    samples = rollout.prompts_per_iteration * rollout.group_size
    values = 1
    for size in shape:
        values *= size
    return {
        "generator": f"{family.pipeline_class} at {family.folder}",
        "latents": "x".join(map(str, shape)),
        "training prompts": len(prompts),
        "samples per iteration": f"{rollout.prompts_per_iteration} prompts x {rollout.group_size} = {samples}",
        "sampler": f"{config.sampler.law}, {table.num_steps} steps, stochastic {_ranges(table.stochastic_steps)}, "
        f"guided {_ranges(table.guided_steps) or 'none'}",
        "trained transitions per iteration": samples * kept,
        "trajectory bytes per iteration": samples * kept * values * 8,
        "rollout actors": f"{pools.rollout.num_actors} x {pools.rollout.num_gpus:g} GPU",
        "PRM servers": f"{pools.prm.num_actors} x {pools.prm.num_gpus:g} GPU" if config.rewards.process else "none",
        "ORM servers": f"{pools.orm.num_actors} x {pools.orm.num_gpus:g} GPU",
        "learner ranks": f"{pools.learner.num_workers} x {pools.learner.num_gpus:g} GPU",
    }


def _ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def prepare_run_dir(config: RunConfig) -> Checkpoint | None:
    """Makes the run's folder, or finds where an earlier run in it left off.

    Nothing is ever overwritten: with ``resume: never`` an old folder is moved aside.

    Raises:
        CheckpointError: there is an old run but no good checkpoint to resume from.
        ConfigError: the run to resume was another one.
    """
    folder, resume = config.run_dir, config.resume
    checkpoint = None
    if isinstance(resume, Path):
        if not resume.is_dir():
            raise ConfigError(f"resume: {resume} is neither 'auto' nor 'never' nor the folder of a checkpoint")
        checkpoint = verify(resume.resolve())
    elif folder.exists() and any(folder.iterdir()):
        store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep_last)
        metrics = folder / METRICS_FILE
        began = metrics.exists() and metrics.stat().st_size > 0
        if resume == "never" or (began and not store.folders()):
            # A run that was killed before its first checkpoint has nothing to go on from, and starts anew.
            aside = folder.with_name(f"{folder.name}.{datetime.datetime.now():%Y%m%d-%H%M%S}")
            folder.rename(aside)
            log.warning("moved the earlier run %s aside to %s", folder, aside)
        else:
            checkpoint = store.newest()
            if checkpoint is None and began:
                raise CheckpointError(
                    f"{folder} holds an earlier run, but all its checkpoints are damaged; take another name=..., or "
                    "resume=never to move it aside"
                )
    if checkpoint is not None:
        _check_same_run(checkpoint, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(dump_config(config))
    return checkpoint


def is_complete(config: RunConfig, checkpoint: Checkpoint) -> bool:
    """Whether the run of a checkpoint has nothing left to do: trained, evaluated and exported."""
    done = checkpoint.state.iteration
    if done != config.iterations:
        return done > config.iterations
    evaluated = any(
        r["iteration"] == done and "eval/total/mean" in r for r in read_metrics(config.run_dir / METRICS_FILE)
    )
    return evaluated and (config.run_dir / "export").is_dir()


def _check_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    old = yaml.safe_load((checkpoint.folder / "config.yaml").read_text())
    new = config.model_dump(mode="json")
    for part in ("model", "seed"):
        if old.get(part) != new[part]:
            raise ConfigError(
                f"resume: {checkpoint.folder} is of a run with {part}: {old.get(part)}, this one has {new[part]}; "
                "take another name=... for another run"
            )
    for part in sorted(set(new) - {"name", "output_dir", "resume"}):
        if old.get(part) != new[part]:
            log.warning("resuming with other settings in %s: %s -> %s", part, old.get(part), new[part])


def connect_ray(namespace: str, *, verbose: bool) -> None:
    """Joins the cluster that RAY_ADDRESS names or that ``ray start`` started on this machine, or starts one here.

    A cluster that another program started for itself is left alone: it ends with that program.

    Args:
        namespace: of the run's actors.
        verbose: print what the actors log; it is in Ray's log files and dashboard in any case.
    """
    _quiet_ray()
    _follow_authentication([os.environ.get("RAY_ADDRESS", "")])
    import ray

    options: dict[str, Any] = {"namespace": namespace, "logging_level": logging.WARNING, "log_to_driver": verbose}
    try:
        ray.init(**options)
    except ConnectionError:
        if os.environ.get("RAY_ADDRESS"):
            raise
        # Ray's note of a cluster that is gone.
        ray.init(address="local", **options)


def join_ray() -> None:
    """Joins the cluster that runs on this machine or that the environment names.

    Raises:
        PreflightError: there is none.
    """
    _quiet_ray()
    named = os.environ.get("RAY_ADDRESS")
    _follow_authentication([named] if named else _clusters_here())
    import ray

    try:
        ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except ray.exceptions.AuthenticationError as error:
        raise PreflightError(
            "the cluster asks for a token: put it into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except ConnectionError as error:
        raise PreflightError(
            "no Ray cluster is running on this machine, and RAY_ADDRESS names none: is the job running?"
        ) from error


def _clusters_here() -> list[str]:
    """Addresses of the Ray clusters that run on this machine."""
    flag = "--gcs-address="
    words = itertools.chain.from_iterable(p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]))
    return sorted({word.removeprefix(flag) for word in words if word.startswith(flag)})


def _follow_authentication(addresses: Sequence[str]) -> None:
    """Has Ray show its token where a cluster asks for one, as those do that a run starts itself.

    Left to itself, Ray tries for 20 s without one, and then does not say why it failed. It reads the variable when it
    is imported.
    """
    if os.environ.get("RAY_AUTH_MODE") is None and any(map(_asks_for_a_token, addresses)):
        os.environ["RAY_AUTH_MODE"] = "token"


def _asks_for_a_token(address: str) -> bool:
    import grpc

    if not re.fullmatch(r"[^/]+:[0-9]+", address):
        return False
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=5)
        except grpc.RpcError as error:
            # Whatever else is wrong, joining will tell.
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _quiet_ray() -> None:
    """Ray's own notices are for people who write Ray programs."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A call that fails has several results, each of which would be reported once more; we await one of them.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # That a local cluster asks for its token is what we want, and what SECURITY.md says.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def beside_the_driver() -> dict[str, Any]:
    """Options of an actor that only passes things on: on the driver's node, without which there is no run anyway."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own_node = NodeAffinitySchedulingStrategy(node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": own_node}


async def name_is_free(name: str) -> None:
    """Waits for what a run of this name that was killed a moment ago has left; Ray takes it away.

    Raises:
        PreflightError: a run of this name is running in this cluster.
    """
    import ray

    deadline = time.monotonic() + LEFTOVERS_TIMEOUT_S
    while names := ray.util.list_named_actors():
        if time.monotonic() > deadline:
            raise PreflightError(
                f"a run named {name} is running in this cluster ({', '.join(sorted(names))}): "
                "stop it, or take another name=..."
            )
        await asyncio.sleep(0.5)
