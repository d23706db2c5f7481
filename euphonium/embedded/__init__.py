"""The embedded generator of the demo, a tiny text-to-video pipeline of the HunyuanVideo family: data and training."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
