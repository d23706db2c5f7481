"""Pools of Ray actors, and what a run asks of them."""
