"""Puts the checkout's root on the path of a program that is run as ``python benchmarks/...``, for ``tests.stubs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
