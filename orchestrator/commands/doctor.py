"""``euphonium doctor``: whether a cluster is fit for a recipe, a line a finding."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from euphonium.errors import ConfigError, PreflightError
from orchestrator.commands.arguments import file_argument


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(parser=file_argument, metavar="[RECIPE]", help="Recipe of train that is to run there."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: a.b=c.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings for programs.")] = False,
) -> int:
    """Look at the running cluster and every node of it: PASS, WARN or FAIL, and what to do.

    Looks at the cluster that RAY_ADDRESS names, or at that of this machine. Status 3 if anything FAILs.
    """
    from euphonium.config import RunConfig, load_config
    from orchestrator.commands.paths import absolute_paths
    from orchestrator.deployment.doctor import examine
    from orchestrator.deployment.findings import as_json as to_json
    from orchestrator.deployment.findings import as_text

    if recipe is None and overrides:
        raise ConfigError("overrides without a recipe: put the recipe first")
    config: RunConfig | None = None
    if recipe is not None:
        config = absolute_paths(load_config(recipe, overrides or []))
    findings = examine(config)
    sys.stdout.write((to_json if as_json else as_text)(findings) + "\n")
    return PreflightError.exit_status if any(finding.result == "FAIL" for finding in findings) else 0
