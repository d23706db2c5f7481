"""Environment of processes that tests start from this checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with the checkout first among the places of packages, and some changes."""
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))} | changes
