"""The study of methods on the embedded generator: one command a table.

    python -m benchmarks.study convergence --seeds 1 2 3 4 5 --jobs 2
    python -m benchmarks.study convergence --quick

Every run is a process of its own with one thread and the numbers of the service (``benchmarks/single_process.py``).
Finished runs are kept in ``--folder`` and never run again, so that the command may be killed and repeated, and a table
can be extended by seeds. Results go to ``benchmarks/results/study_<table>.json`` and ``docs/study/``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
from datetime import date
from pathlib import Path

from benchmarks.study.plans import COMMON, PLANS, QUICK
from benchmarks.study.runs import ROOT, Trial, run_all
from benchmarks.study.tables import as_json, markdown, plot, rows


def main() -> None:
    """Command line of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(PLANS), help="what to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="seeds of every method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=24, help="of every run (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", help="only these rows of the table; the reference is always run")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study", help="where finished runs are kept")
    parser.add_argument(
        "--quick", action="store_true", help="two seeds and few, small iterations: does everything run?"
    )
    parser.add_argument("--output", type=Path, default=ROOT, help="root of the folders that results are written to")
    arguments = parser.parse_args()

    plan = PLANS[arguments.table]
    methods = [m for m in plan.methods if not arguments.methods or m.name in (*arguments.methods, plan.reference)]
    seeds = [1, 2] if arguments.quick else arguments.seeds
    common = QUICK if arguments.quick else (f"iterations={arguments.iterations}", *COMMON)
    trials = [Trial(method, seed, common) for seed in seeds for method in methods]
    found = rows(run_all(trials, arguments.folder, arguments.jobs))

    table = markdown(found, plan.reference)
    print(table)
    if arguments.quick:
        return
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {
        "table": arguments.table,
        "date": date.today().isoformat(),
        "commit": commit,
        "machine": f"{platform.machine()}, one core a run",
        "command": command(arguments),
        "methods": {m.name: [m.recipe, *common, *m.overrides] for m in methods},
        "reference": plan.reference,
        "rows": as_json(found),
    }
    pages = arguments.output / "docs" / "study"
    pages.mkdir(parents=True, exist_ok=True)
    (pages / f"{arguments.table}.svg").write_text(plot(found, plan.title))
    (pages / f"{arguments.table}.md").write_text(
        f"# {plan.title}\n\n{result['date']}, commit {commit}, `{result['command']}`. Held-out total reward, mean and "
        f"standard error over the seeds.\n\n{table}\n![{plan.title}]({arguments.table}.svg)\n"
    )
    results = arguments.output / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / f"study_{arguments.table}.json").write_text(json.dumps(result, indent=1) + "\n")


def command(arguments: argparse.Namespace) -> str:
    """What repeats a table, wherever its runs and results are kept."""
    numbers = ["--seeds", *map(str, arguments.seeds), "--iterations", str(arguments.iterations)]
    methods = ["--methods", *arguments.methods] if arguments.methods else []
    return shlex.join(["python", "-m", "benchmarks.study", arguments.table, *numbers, *methods])


if __name__ == "__main__":
    main()
