"""The embedded default generator: a tiny text-to-video pipeline of the HunyuanVideo family and its training."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
