"""``euphonium debug``: parts of a run by themselves, in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from euphonium.errors import ConfigError
from euphonium.locks import writing_alone
from orchestrator.commands.arguments import file_argument

if TYPE_CHECKING:
    from euphonium.config import RunConfig

app = typer.Typer(
    help="Run parts of a run by themselves, in this process and without Ray, to find which of them is at fault.",
    no_args_is_help=True,
)

Recipe = Annotated[Path, typer.Argument(parser=file_argument, metavar="RECIPE", help="YAML recipe of euphonium train.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: a.b=c.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", parser=file_argument, metavar="FOLDER", help="For the results.")
]
Groups = Annotated[
    Path, typer.Option("--groups", parser=file_argument, metavar="FOLDER", help="What debug rollout has written.")
]


@app.command()
def rollout(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Output = Path("debug"),
    iterations: Annotated[int, typer.Option(min=1, max=1000, help="Iterations whose groups are drawn.")] = 1,
) -> None:
    """Rollout only: draw and score groups with the generator's weights, and write them to disk."""
    from orchestrator.commands.cli import say
    from orchestrator.debug.drawing import Drawer, save_group, write_recipe

    config = _config(recipe, overrides)
    with writing_alone([(output, "--output")]):
        drawer, count = Drawer(config), config.rollout.prompts_per_iteration
        write_recipe(config, output)
        for ordinal in range(iterations * count):
            group = drawer.draw(ordinal, ordinal // count)
            file = save_group(group, output)
            scores = "  ".join(f"{name} {values.mean():.3f}" for name, values in group.scores.items())
            say(f"{file} | {group.info.seconds['total']:.1f} s | {scores} | {group.info.task.prompt}")


@app.command()
def train(recipe: Recipe, groups: Groups, overrides: Overrides = None, output: Output = Path("debug")) -> None:
    """Train only: update the policy on groups from disk, and write metrics; the weights are not kept.

    One rank here; ``torchrun --nproc-per-node N -m orchestrator debug train ...`` makes N ranks of it.
    """
    from orchestrator.commands.cli import say
    from orchestrator.debug.training import train_on_saved

    train_on_saved(_config(recipe, overrides), groups, output, say)


@app.command()
def probe(recipe: Recipe, groups: Groups, overrides: Overrides = None) -> None:
    """No optimiser step: compare the learner's probabilities with the rollout's, step by step.

    The groups must have been drawn with the recipe's generator. Ranks as for debug train.
    """
    from orchestrator.commands.cli import say
    from orchestrator.debug.training import probe_saved

    probe_saved(_of_transitions(_config(recipe, overrides)), groups, say)


@app.command()
def group(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Output = Path("debug"),
    ordinal: Annotated[int, typer.Option(min=0, help="Number of the group in the run; chooses prompt and seed.")] = 0,
    iteration: Annotated[int, typer.Option(min=0, help="Iteration, from 0; moving windows depend on it.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="Another prompt.")] = None,
) -> None:
    """One group in detail: states, rewards, advantages, ratios and gradient norms of every step.

    Writes ``group.csv`` (a row for each transition of each sample) and ``group.png`` (the decoded states).
    """
    from orchestrator.commands.cli import say
    from orchestrator.debug.detail import by_step, inspect_group, write_picture, write_table
    from orchestrator.debug.drawing import Drawer, write_recipe

    config = _of_transitions(_config(recipe, overrides))
    with writing_alone([(output, "--output")]):
        drawer = Drawer(config)
        drawn = drawer.draw(ordinal, iteration, prompt)
        transitions = inspect_group(config, drawer, drawn)
        write_recipe(config, output)
        write_table(transitions, output / "group.csv")
        write_picture(drawer, drawn, transitions, output / "group.png")
    say(drawn.info.task.prompt)
    for line in by_step(transitions):
        say(line)
    say(f"{output / 'group.csv'}\n{output / 'group.png'}")


def _of_transitions(config: RunConfig) -> RunConfig:
    """The recipe, refused where there are no probabilities to look at."""
    if config.objective.noises_samples:
        raise ConfigError(
            f"objective.kind: {config.objective.kind} trains on noised samples, without probabilities to compare; "
            "take debug rollout or debug train"
        )
    return config


def _config(recipe: Path, overrides: list[str] | None) -> RunConfig:
    """The checked recipe with what the plan chooses; nothing is compiled, which would take longer than the look."""
    from euphonium.config import load_config
    from orchestrator.commands.launch import preflight
    from orchestrator.commands.paths import absolute_paths
    from orchestrator.commands.planning import settle

    config: RunConfig = absolute_paths(load_config(recipe, overrides or []))
    preflight(config)
    config = settle(config, recipe)
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"compile": False})})
