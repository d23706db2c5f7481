"""Clips outside of a run: which to draw, with what, into which files, and what is left to do."""
