"""The plans of the shipped recipes as a table: ``python -m orchestrator.plan.pages`` writes it into docs/planning.md.

A test fails when the table is not current, or when a recipe does not fit the GPUs that it is meant for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from euphonium.config import RunConfig, load_config
from orchestrator.plan.choice import choose
from orchestrator.plan.hardware import GB, Hardware
from orchestrator.plan.plan import Plan, blocks_of_prm, make_plan
from orchestrator.plan.table import duration

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "planning.md"
BEGIN, END = "<!-- plans: python -m orchestrator.plan.pages -->\n", "<!-- end of plans -->\n"
HEAD = (
    "| recipe | GPUs: rollout, PRM, ORM, learner | GiB of a GPU, the same | PFLOP an iteration, the same "
    "| trajectories | new weights | an iteration | shortest split |\n|---|---|---|---|---|---|---|---|\n"
)
ROLES = ("rollout", "prm", "orm", "learner")
# Machines of recipes whose names begin so: one with a single GPU, one with eight.
MACHINES: dict[str, dict[str, Any]] = {
    "one-gpu": {"nodes": 1, "gpus_per_node": 1, "host_gib": 128.0},
    "one-node": {"nodes": 1},
}


def recipes() -> list[Path]:
    """Recipes of published models, relative to the repository; those of the embedded generator take no GPU."""
    found = sorted((ROOT / "recipes").rglob("*.yaml"))
    runs = [
        path
        for path in found
        if path.name not in ("base.yaml", "prm.yaml", "orm.yaml") and path.parent.name != "embedded"
    ]
    return [path.relative_to(ROOT) for path in runs]


def plan_of(recipe: Path) -> Plan:
    """The plan of a shipped recipe on the GPUs that it is meant for: of 80 GiB, unless it says otherwise."""
    config: RunConfig = load_config(ROOT / recipe)
    stated = config.pools.gpu_memory_gib or Hardware.gpu_gib
    config = choose(config, stated, lambda: blocks_of_prm(config, ROOT / recipe))
    machines = next((m for begin, m in MACHINES.items() if recipe.stem.startswith(begin)), {})
    return make_plan(config, Hardware(gpu_gib=stated, **machines), blocks_of_prm(config, ROOT / recipe))


def row(recipe: Path, plan: Plan) -> str:
    """A recipe's line of the table."""
    by_role = {fit.role: fit for fit in plan.fits}
    members = [str(by_role[role].members) if role in by_role else "-" for role in ROLES]
    gib = [f"{by_role[role].gpu_gib:.0f}" if role in by_role else "-" for role in ROLES]
    together = f"; together {plan.shared.needed_gib:.0f}" if plan.shared is not None else ""
    work = [f"{plan.petaflops[role]:.3g}" if role in by_role else "-" for role in ROLES]
    time = duration(plan.time.total) if plan.time is not None else "-"
    best = "-"
    if plan.best is not None and plan.best_time is not None:
        sizes = [str(getattr(plan.best, role)) if role in by_role else "-" for role in ROLES]
        best = f"{', '.join(sizes)}: {duration(plan.best_time.total)}"
    cells = [
        f"`{recipe.relative_to('recipes')}`", ", ".join(members), ", ".join(gib) + together, ", ".join(work),
        f"{plan.work.iteration_bytes / GB:.3g} GB", f"{plan.publication_bytes / GB:.3g} GB", time, best,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Writes the table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "".join(row(recipe, plan_of(recipe)) for recipe in recipes())
    PAGE.write_text(before + BEGIN + HEAD + rows + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
