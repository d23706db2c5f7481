"""``euphonium recipes``: the shipped recipes, in a folder of one's own."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

from euphonium.errors import ConfigError, PreflightError
from orchestrator.commands.arguments import file_argument

# Where a wheel puts them, below the environment's folder.
INSTALLED = Path("share", "euphonium", "recipes")
# What recipes in a checkout say of files that are inside the package.
EMBEDDED = "euphonium/embedded/"


def recipes(
    folder: Annotated[Path, typer.Argument(parser=file_argument, metavar="FOLDER", help="Where recipes/ is made.")],
) -> None:
    """Copy the shipped recipes and their prompts into FOLDER/recipes, to be run and changed from FOLDER."""
    target = folder / "recipes"
    if target.exists():
        raise ConfigError(f"{target} exists: nothing is overwritten; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(shipped_recipes(), target, ignore=shutil.ignore_patterns("__pycache__"))
    import euphonium

    package = f"{Path(euphonium.__file__).resolve().parent}/embedded/"
    for recipe in target.rglob("*.yaml"):
        text = recipe.read_text(encoding="utf-8")
        recipe.write_text(text.replace(f": {EMBEDDED}", f": {package}"), encoding="utf-8")
    there = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    sys.stdout.write(f"{target}\nnow: {there}euphonium train recipes/embedded/demo.yaml name=demo\n")


def shipped_recipes() -> Path:
    """Folder of the shipped recipes: of the checkout, or of the environment that the wheel is installed in.

    Raises:
        PreflightError: there are none.
    """
    checkout = Path(__file__).parents[2] / "recipes"
    installed = Path(sysconfig.get_path("data")) / INSTALLED
    for place in (checkout, installed):
        if (place / "embedded").is_dir():
            return place
    raise PreflightError(f"no recipes in {checkout} or {installed}: install the package from its wheel or a checkout")
