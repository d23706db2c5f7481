"""``python -m orchestrator``: the same command line as the console script."""

from orchestrator.cli import main

main()
