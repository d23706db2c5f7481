"""``euphonium render``: the manifest of a cluster for a recipe, for the cluster launcher, KubeRay or Slurm."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from euphonium.errors import ConfigError
from orchestrator.commands.arguments import file_argument

if TYPE_CHECKING:
    from euphonium.config import RunConfig
    from orchestrator.deployment.node_groups import Machine, NodeGroup

Target = Literal["ray-up", "kuberay", "kuberay-cluster", "slurm"]


def render(
    recipe: Annotated[
        Path, typer.Argument(parser=file_argument, metavar="RECIPE", help="Recipe of train; its path is the cluster's.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: a.b=c.")
    ] = None,
    to: Annotated[
        Target,
        typer.Option(help="ray up's file, KubeRay's RayJob or RayCluster, or a batch script for Slurm."),
    ] = "ray-up",
    gpu: Annotated[float | None, typer.Option(help="GiB of a GPU; default: pools.gpu_memory_gib, or 80.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="GPUs of a node.")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, max=1024, help="CPUs of a node with GPUs.")] = 96,
    host: Annotated[float, typer.Option(min=1, max=100_000, help="GiB of a node's memory.")] = 1000.0,
    image: Annotated[str, typer.Option(help="Container image of all roles.")] = "euphonium:latest",
    instance: Annotated[str, typer.Option(help="Type of the cloud's instances with GPUs.")] = "p5.48xlarge",
) -> None:
    """Print the manifest of a cluster for a recipe: its pools as groups of nodes, with memory as the plan counts it.

    Starts nothing. Status 2 if the plan does not fit these nodes.
    """
    nodes = {"gpus_per_node": gpus_per_node, "host_gib": host} | ({} if gpu is None else {"gpu_gib": gpu})
    given = {"cpus": cpus_per_node, "image": image, "instance": instance}
    sys.stdout.write(rendered(recipe, overrides or [], to, nodes, given))


def rendered(
    recipe: Path, overrides: Sequence[str], to: Target, nodes: Mapping[str, float], given: Mapping[str, Any]
) -> str:
    """A manifest's text, of a recipe whose plan fits.

    Args:
        recipe: the recipe.
        overrides: ``a.b=c`` settings that replace the recipe's.
        to: for what it is.
        nodes: fields of :class:`orchestrator.plan.hardware.Hardware`.
        given: further fields of :class:`orchestrator.deployment.node_groups.Machine`.

    Raises:
        ConfigError: the recipe cannot be planned, or does not fit these nodes.
    """
    from euphonium.config import load_config
    from orchestrator.commands.planning import settle
    from orchestrator.deployment.node_groups import Machine, node_groups, train_command
    from orchestrator.plan.hardware import Hardware
    from orchestrator.plan.plan import blocks_of_prm, make_plan

    config: RunConfig = load_config(recipe, overrides)
    stated = {} if config.pools.gpu_memory_gib is None else {"gpu_gib": config.pools.gpu_memory_gib}
    assumed: dict[str, Any] = {**stated, **nodes}
    hardware = Hardware(**assumed)
    plan = make_plan(settle(config, recipe, hardware.gpu_gib), hardware, blocks_of_prm(config, recipe))
    if plan.problems:
        raise ConfigError("the recipe does not fit these nodes:\n  " + "\n  ".join(plan.problems))
    machine = Machine(gpus=hardware.gpus_per_node, host_gib=hardware.host_gib, store_gib=hardware.store_gib, **given)
    groups = node_groups(config, machine, plan.gpus)
    return manifest(
        config, train_command(config, recipe, overrides, groups, *further_settings(to)), to, groups, machine
    )


def further_settings(to: Target) -> list[str]:
    """Overrides that a target asks for."""
    from orchestrator.deployment.node_groups import METRICS_PORT

    # Where pods come and go, the run's metrics need a port that is known.
    return [] if "kuberay" not in to else ["metrics.prometheus_host=0.0.0.0", f"metrics.prometheus_port={METRICS_PORT}"]


def manifest(config: RunConfig, command: str, to: Target, groups: Sequence[NodeGroup], machine: Machine) -> str:
    """A manifest's text.

    Args:
        config: the recipe.
        command: the driver's command.
        to: for what it is.
        groups: nodes.
        machine: image and instances.
    """
    from orchestrator.deployment import kuberay
    from orchestrator.deployment.ray_up import ray_up
    from orchestrator.deployment.slurm import sbatch

    name = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:40].strip("-") or "euphonium"
    if to == "slurm":
        return sbatch(name, command, groups)
    write = {"ray-up": ray_up, "kuberay": kuberay.ray_job, "kuberay-cluster": kuberay.ray_cluster}[to]
    return write(name, command, groups, machine)
