"""Training of process and outcome reward models on preferences, before a run and during it."""
