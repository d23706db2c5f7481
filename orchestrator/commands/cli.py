"""The command line: ``euphonium`` and ``python -m orchestrator``.

Heavy libraries are imported by the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from euphonium.errors import ConfigError, EuphoniumError
from euphonium.text_files import quoted, shown
from orchestrator.commands.arguments import file_argument
from orchestrator.commands.compare import compare, tally
from orchestrator.commands.debug import app as debug_app
from orchestrator.commands.doctor import doctor
from orchestrator.commands.evaluate import evaluate
from orchestrator.commands.generate import generate
from orchestrator.commands.label import label, preferences
from orchestrator.commands.preprocess import preprocess
from orchestrator.commands.recipes import recipes
from orchestrator.commands.render import render
from orchestrator.commands.report import report, watch
from orchestrator.commands.submit import submit

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorProxy

    from euphonium.wire.roles import Desk

_T = TypeVar("_T")

app = typer.Typer(
    name="euphonium",
    help="RL post-training of flow-matching image and video generators, as a distributed Ray application.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What the parser raises for arguments that do not fit; only its subclass is exported.
_UsageError: Any = typer.BadParameter.__base__


Recipe = Annotated[
    Path,
    typer.Argument(
        parser=file_argument, metavar="RECIPE", help="YAML recipe, for example recipes/embedded/euphonium.yaml."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: a.b=c.")
]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print what the actors log, too.")] = False,
) -> None:
    """Train a policy.

    Joins the running Ray cluster, or starts one on this machine. SIGTERM and Ctrl-C write a checkpoint and end with
    status 0; the same command then goes on from there.
    """
    from euphonium.config import RunConfig, load_config
    from orchestrator.commands.paths import absolute_paths
    from orchestrator.commands.train import train_policy

    config: RunConfig = absolute_paths(load_config(recipe, overrides or []))
    train_policy(config, say, verbose=verbose)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="Name of the run; may be left out if there is only one.")] = None,
) -> None:
    """Show a running job: its pools, policy version, queue and last iteration."""
    from orchestrator.commands.control import ANSWER_TIMEOUT_S, describe_status

    with _running(run) as (name, desk):
        answer = _ask(desk.status.remote(), ANSWER_TIMEOUT_S)
        say(describe_status(name, answer))


@app.command()
def scale(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=SIZE...", help="rollout=6 prm=2 orm=1 learner=2.")],
) -> None:
    """Change pools of a running job.

    New actors load their models, fetch the current weights and join; leaving ones finish what they do. The learner
    group writes a checkpoint after its current iteration and starts from it with the new number of ranks. A run that
    is resumed later starts with the recipe's sizes.
    """
    from orchestrator.commands.control import ANSWER_TIMEOUT_S, parse_sizes

    wanted = parse_sizes(sizes)
    with _running(run) as (name, desk):
        before = _ask(desk.scale.remote(wanted), ANSWER_TIMEOUT_S)
        for role, size in wanted.items():
            old = "?" if before is None else before.pools[role].wanted
            say(f"{name}: {role} {old} -> {size} is under way; see euphonium status {name}")


@contextlib.contextmanager
def _running(run: str | None) -> Iterator[tuple[str, ActorProxy[Desk]]]:
    """Name and control desk of a running job; connected to its cluster while the context is open."""
    from orchestrator.commands.control import find_desk
    from orchestrator.pools.ray_session import join_ray

    join_ray()
    import ray

    try:
        yield find_desk(run)
    finally:
        ray.shutdown()


def _ask(call: ObjectRef[_T], timeout_s: float) -> _T:
    from euphonium.wire.deadlines import get

    return get(call, timeout_s, "the answer of the run")


@app.command()
def validate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe, its files, its arithmetic and its memory, and print the resolved configuration; starts nothing.

    Takes recipes of train, train-prm and train-orm. A published model that is not here is checked by its configuration
    files. Memory that does not fit is a warning, or an error where pools.gpu_memory_gib says what the GPUs have.
    """
    from euphonium.generators.libraries import uncollected

    # All of it, for the process ends with it.
    with uncollected():
        from euphonium.config import dump_config, load_any_config
        from orchestrator.commands.validation import validated

        config, found = validated(load_any_config(recipe, overrides or []), recipe)
    say(dump_config(config))
    width = max(map(len, found))
    for name, value in found.items():
        say(f"# {name:<{width}}  {value}")


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[float | None, typer.Option(help="GiB of a GPU; default: pools.gpu_memory_gib, or 80.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes with GPUs; default: as many as the pools fill.")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node.")] = 8,
    host: Annotated[float, typer.Option(help="GiB of a node's memory.")] = 1000.0,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Another assumption that the plan prints, such as mfu=0.3 or tflops=362."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan for programs.")] = False,
) -> None:
    """Tell whether a recipe fits its GPUs, and how long an iteration takes; starts nothing and needs no weights.

    Takes recipes of train, train-prm and train-orm. Memory and operations are those of the real networks, run on the
    meta device; seconds follow from assumed speeds.
    Status 2 if it does not fit.
    """
    from orchestrator.commands.planning import print_plan

    sizes = {"gpu_gib": gpu, "nodes": nodes, "gpus_per_node": gpus_per_node, "host_gib": host}
    print_plan(recipe, overrides or [], sizes, assume or [], as_json=as_json, say=say)


BY_FUNCTION = (
    preprocess, generate, evaluate, compare, tally, label, preferences, report, watch, submit, doctor, render, recipes,
)  # fmt: skip
for command in BY_FUNCTION:
    app.command()(command)
app.add_typer(debug_app, name="debug")


@app.command("train-prm")
def train_prm_command(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a process reward model on preferences, or on the generator's samples ranked by outcome rewards.

    Goes on from its newest checkpoint if it was interrupted.
    """
    from euphonium.config import PrmConfig, load_config
    from orchestrator.commands.train_prm import train_prm

    train_prm(load_config(recipe, overrides or [], PrmConfig), say)


@app.command("train-orm")
def train_orm_command(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train an outcome reward model, a vision-language model with a scalar head, on preferences over videos.

    Goes on from its newest checkpoint if it was interrupted.
    """
    from euphonium.config import OrmConfig, load_config
    from orchestrator.commands.train_orm import train_orm

    train_orm(load_config(recipe, overrides or [], OrmConfig), say)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(parser=file_argument, metavar="MODEL", help="Checkpoint or run folder.")],
    output: Annotated[
        Path, typer.Argument(parser=file_argument, metavar="OUTPUT", help="New folder for the diffusers pipeline.")
    ],
    policy: Annotated[bool, typer.Option("--policy", help="The policy itself, not its moving average.")] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The low-rank adapter alone, for ``pipeline.load_lora_weights``.")
    ] = False,
) -> None:
    """Write a checkpoint as a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads."""
    from euphonium.locks import writing_alone

    with writing_alone([(output, "OUTPUT")]):
        from orchestrator.export_policy import export_adapter, export_checkpoint
        from orchestrator.generation.policies import open_checkpoint

        checkpoint, config = open_checkpoint(model)
        write = export_adapter if adapter else export_checkpoint
        write(checkpoint.folder, config, output, policy=policy)
    say(str(output))


@app.command()
def options(
    prefix: Annotated[
        str, typer.Argument(help="Show only fields that begin with this (sampler), or options of a reward (ocr).")
    ] = "",
    prm: Annotated[bool, typer.Option("--prm", help="Fields of train-prm recipes instead.")] = False,
    orm: Annotated[bool, typer.Option("--orm", help="Fields of train-orm recipes instead.")] = False,
) -> None:
    """List every field of a recipe and every option of a reward: type, default, meaning."""
    from euphonium.config import OrmConfig, PrmConfig, RunConfig
    from orchestrator.commands.reference import fields_with_reward_options

    tree = PrmConfig if prm else OrmConfig if orm else RunConfig
    listed = fields_with_reward_options(tree)
    shown = [field for field in listed if field.path.startswith(prefix) or f"[type={prefix}]" in field.path]
    if not shown:
        raise ConfigError(f"no field begins with {quoted(prefix)}; `euphonium options` lists all")
    for field in shown:
        say(f"{field.path}  ({field.kind}, {field.default})\n    {field.description}")


def say(text: str) -> None:
    """Prints a line for the user."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point of the console script: turns errors into a line, and into an exit status (euphonium/errors.py)."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("ray", "diffusers", "transformers", "httpx", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # A terminal may not have every character of a prompt.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A console script does not look for modules where it is called, but recipes name rewards of people's own by module.
    # Behind everything else, so that nothing there takes the place of a library.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    status = run_command(sys.argv[1:] or ["--help"])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: Ray Train's thread may still be in a call, and shutting the interpreter down meanwhile has crashed.
    os._exit(status)


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit status, after a line on stderr if it is not 0."""
    try:
        result = app(list(arguments), prog_name="euphonium", standalone_mode=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except EuphoniumError as error:
        return _failed(str(error), error.exit_status)
    except _UsageError as error:
        context: typer.Context | None = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "euphonium"
        what = " ".join(error.format_message().rstrip(".").split())
        return _failed(f"{shown(what, 500)}; see {command} --help", ConfigError.exit_status)
    except typer.Abort:
        return _failed("stopped", EuphoniumError.exit_status)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _failed(
                f"{error}. Make room; the same command then goes on from the newest checkpoint",
                EuphoniumError.exit_status,
            )
        if error.filename is None:
            raise
        return _failed(f"{shown(error.filename, 1000)}: {error.strerror}; see to the path", EuphoniumError.exit_status)
    return result if isinstance(result, int) else 0


def _failed(message: str, status: int) -> int:
    # What people gave is part of it, and must not reach a terminal as it is.
    sys.stderr.write("error: " + "\n".join(shown(line, 2000) for line in message.split("\n")) + "\n")
    return status


if __name__ == "__main__":
    main()
