"""What a run is between two iterations: its position, its checkpoints, and whether it is to stop."""
