"""``python -m orchestrator``: the same command line as the console script."""

from orchestrator.commands.cli import main

main()
