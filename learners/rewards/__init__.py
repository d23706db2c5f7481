"""Training of reward models: process and outcome, before a run and during it."""
