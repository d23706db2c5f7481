"""``euphonium submit``: a training as a job of a Ray cluster, from a working tree here.

The recipe is checked here first. Then the tree is packed and sent, the job's output is followed, and the command ends
with the driver's own exit status.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from euphonium.errors import ConfigError
from orchestrator.commands.arguments import file_argument

if TYPE_CHECKING:
    from euphonium.config import OrmConfig, PrmConfig, RunConfig

# As shells have it for Ctrl-C.
INTERRUPTED = 130


def submit(
    recipe: Annotated[
        Path,
        typer.Argument(
            parser=file_argument, metavar="RECIPE", help="Recipe of train, train-prm or train-orm, in the working tree."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: a.b=c.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of Ray's dashboard; default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."),
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--working-dir",
            parser=file_argument,
            metavar="FOLDER",
            help="Working tree that is packed and sent, without what .gitignore and .rayignore name.",
        ),
    ] = Path("."),
    python: Annotated[str, typer.Option(help="Interpreter on the cluster's head.")] = "python",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
) -> int:
    """Train on a cluster: check the recipe, send the working tree, follow the job, end with its exit status.

    Ctrl-C ends the following alone; the job goes on.
    """  # fmt: skip
    from euphonium.config import load_any_config
    from orchestrator.deployment.jobs import Job, connect, dashboard_address, follow, outcome
    from orchestrator.deployment.jobs import submit as submit_job

    given = overrides or []
    config = load_any_config(recipe, given)
    place = _inside(recipe, folder)
    _refuse_lost_output(config)
    target = dashboard_address(address)
    command = shlex.join([python, "-m", "orchestrator", _command_of(config), str(place), *given])
    job = Job(name=config.name, entrypoint=command, folder=folder.resolve(), metadata=metadata(config, place, folder))
    client = connect(target)
    number = submit_job(client, job)
    _write(_how_to(number, config.name, target, f"euphonium submit {shlex.join([str(recipe), *given])}"))
    if not wait:
        return 0
    try:
        follow(client, number, _write)
    except KeyboardInterrupt:
        _write(f"\nno longer following; the job goes on: ray job stop --address {target} {number}\n")
        return INTERRUPTED
    outcome(client, number)
    _write(f"job {number}: {client.get_job_status(number).value.lower()}\n")
    return 0


def metadata(config: RunConfig | PrmConfig | OrmConfig, recipe: Path, folder: Path) -> dict[str, str]:
    """What the dashboard shows of a job: run, method, recipe, commit of the working tree, version."""
    from euphonium.config import RunConfig

    method = _command_of(config)
    if isinstance(config, RunConfig):
        guided = config.sampler.guidance is not None
        method = f"{config.sampler.law}, {config.objective.kind}" + (", guided" if guided else "")
    found = {"job_name": config.name, "run": config.name, "method": method, "recipe": str(recipe)}
    commit = _commit(folder)
    if commit:
        found["commit"] = commit
    with contextlib.suppress(PackageNotFoundError):
        found["euphonium"] = version("euphonium")
    return found


def _commit(folder: Path) -> str:
    """Commit of a working tree, ``+changes`` if it has any; empty without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _command_of(config: RunConfig | PrmConfig | OrmConfig) -> str:
    from euphonium.config import OrmConfig, PrmConfig

    return "train-prm" if isinstance(config, PrmConfig) else "train-orm" if isinstance(config, OrmConfig) else "train"


def _inside(recipe: Path, folder: Path) -> Path:
    """The recipe's path in the working tree."""
    try:
        return recipe.resolve().relative_to(folder.resolve())
    except ValueError as error:
        raise ConfigError(
            f"{recipe} is not in {folder.resolve()}, which is all that is sent: put it there, or give --working-dir"
        ) from error


def _refuse_lost_output(config: RunConfig | PrmConfig | OrmConfig) -> None:
    from euphonium.config import RunConfig

    paths = {"output_dir": config.output_dir}
    if not isinstance(config, RunConfig):
        paths["target"] = config.target
    for field, path in paths.items():
        if not path.is_absolute():
            raise ConfigError(
                f"{field}: {path} would be inside the job's copy of the working tree, which Ray removes when it ends; "
                f"give a folder on storage of the cluster, such as {field}=/shared/{path}"
            )


def _how_to(job: str, run: str, address: str, again: str) -> str:
    return (
        f"job {job} is submitted to {address}\n"
        f"  stop, with a checkpoint   ray job stop --address {address} {job}\n"
        f"  look and change, there    euphonium status {run}; euphonium scale {run} rollout=4\n"
        f"  follow again              ray job logs --follow --address {address} {job}\n"
        f"  go on after a stop        {again}\n"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
