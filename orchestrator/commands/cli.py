"""The command line: ``euphonium`` and ``python -m orchestrator``.

Heavy libraries are imported by the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from euphonium.errors import ConfigError, EuphoniumError

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

Recipe = Annotated[Path, typer.Argument(help="YAML recipe, for example recipes/embedded/euphonium.yaml.")]
ProtocolOption = Annotated[
    Literal["implicit", "inference_rgg", "distilled"] | None,
    typer.Option(
        help="Keep the reward gradient (inference_rgg), or sample the policy alone (distilled or implicit, whichever "
        "the run was trained for). Default: alone."
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
    import asyncio

    from euphonium.config import RunConfig, load_config
    from orchestrator.commands.launch import is_complete, preflight, prepare_run_dir
    from orchestrator.commands.paths import absolute_paths
    from orchestrator.pools.ray_session import connect_ray

    config: RunConfig = absolute_paths(load_config(recipe, overrides or []))
    preflight(config)
    checkpoint = prepare_run_dir(config)
    say(f"run {config.name}: {config.run_dir}")
    if checkpoint is not None:
        say(f"resuming from {checkpoint.folder} (iteration {checkpoint.state.iteration})")
        if is_complete(config, checkpoint):
            say(f"nothing to do: {config.iterations} iterations are done")
            return
    namespace = f"euphonium-{config.name}"
    connect_ray(namespace, verbose=verbose)
    import ray

    from orchestrator.lifecycle import execute
    from orchestrator.run import Run

    try:

        async def main() -> None:
            await execute(Run(config, namespace, checkpoint))

        asyncio.run(main())
    finally:
        ray.shutdown()


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

    A published model that is not here is checked by its configuration files. Memory that does not fit is a warning, or
    an error where pools.gpu_memory_gib says what the GPUs have.
    """
    from euphonium.config import RunConfig, dump_config, load_config
    from euphonium.config.foreign import ineffective_variables
    from euphonium.generators.described import describe_generator
    from orchestrator.commands.launch import preflight
    from orchestrator.commands.paths import absolute_paths
    from orchestrator.commands.planning import plan_lines

    config: RunConfig = load_config(recipe, overrides or [])
    ineffective = ineffective_variables(os.environ)
    if ineffective:
        raise ConfigError(
            "the environment configures nothing here; unset these and put them into the recipe or an override:\n  "
            + "\n  ".join(ineffective)
        )
    absolute = absolute_paths(config)
    plan = preflight(absolute, describe_generator(absolute.model)) | plan_lines(absolute, recipe)
    say(dump_config(config))
    width = max(map(len, plan))
    for name, value in plan.items():
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

    Memory and operations are those of the real networks, run on the meta device; seconds follow from assumed speeds.
    Status 2 if it does not fit.
    """
    from orchestrator.commands.planning import print_plan

    sizes = {"gpu_gib": gpu, "nodes": nodes, "gpus_per_node": gpus_per_node, "host_gib": host}
    print_plan(recipe, overrides or [], sizes, assume or [], as_json=as_json, say=say)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Exported pipeline, checkpoint, or run folder.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the clips.")] = Path("generated"),
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="ODE steps; default: that of evaluation.num_steps.")] = None,
    protocol: ProtocolOption = None,
) -> None:
    """Draw clips from a trained model and save them as GIFs with a contact sheet."""
    from euphonium.config import EvaluationConfig
    from orchestrator.commands.inference import generate_clips

    steps = EvaluationConfig().num_steps if steps is None else steps
    for path in generate_clips(model, prompt, output, seed=seed, steps=steps, protocol=protocol):
        say(str(path))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Checkpoint or run folder.")],
    base: Annotated[bool, typer.Option("--base", help="Evaluate the generator before training instead.")] = False,
    prompts: Annotated[int | None, typer.Option(help="Held-out prompts; default: the run's.")] = None,
    samples_per_prompt: Annotated[int | None, typer.Option(help="Samples a prompt; default: the run's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise; default: the run's.")] = None,
    protocol: ProtocolOption = None,
) -> None:
    """Score a checkpoint on held-out prompts: ODE samples and outcome rewards."""
    import json

    from orchestrator.commands.inference import evaluate_model

    changes = {"prompts": prompts, "samples_per_prompt": samples_per_prompt, "seed": seed}
    given = {name: value for name, value in changes.items() if value is not None}
    say(json.dumps(evaluate_model(model, base=base, changes=given, protocol=protocol), indent=2))


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
    model: Annotated[Path, typer.Argument(help="Checkpoint or run folder.")],
    output: Annotated[Path, typer.Argument(help="New folder for the diffusers pipeline.")],
    policy: Annotated[bool, typer.Option("--policy", help="The policy itself, not its moving average.")] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The low-rank adapter alone, for ``pipeline.load_lora_weights``.")
    ] = False,
) -> None:
    """Write a checkpoint as a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads."""
    from orchestrator.commands.inference import open_checkpoint
    from orchestrator.export_policy import export_adapter, export_checkpoint

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
        raise ConfigError(f"no field begins with {prefix!r}; `euphonium options` lists all")
    for field in shown:
        say(f"{field.path}  ({field.kind}, {field.default})\n    {field.description}")


def say(text: str) -> None:
    """Prints a line for the user."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point of the console script: turns the application's errors into a message and an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for chatty in ("ray", "diffusers", "transformers", "httpx", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # A console script does not look for modules where it is called, but recipes name rewards of people's own by module.
    # Behind everything else, so that nothing there takes the place of a library.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    status: Any = 0
    try:
        app()
    except SystemExit as end:
        status = end.code or 0
    except EuphoniumError as error:
        sys.stderr.write(f"error: {error}\n")
        status = error.exit_status
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(f"error: {error}. Make room; the same command then goes on from the newest checkpoint\n")
        status = EuphoniumError.exit_status
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: Ray Train's thread may still be in a call, and shutting the interpreter down meanwhile has crashed.
    os._exit(status)


if __name__ == "__main__":
    main()
