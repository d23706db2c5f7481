"""Makes the paths of a recipe absolute: actors, tasks and workers do not share the driver's working directory."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from euphonium.config import OrmConfig, PrmConfig, RunConfig
from euphonium.config.base import Node

# Prompt files of a reward training are not among them: only the driver reads them.
OF_A_RUN = (
    "output_dir",
    "start_from",
    "model.path",
    "rewards.process.path",
    "prompts.train",
    "prompts.evaluation",
    "prompts.embeddings",
)
OF_A_TRAINING = (
    "output_dir", "model.path", "target", "preferences.train", "preferences.held_out", "preferences.embeddings",
    "prompts.embeddings",
)  # fmt: skip

_Recipe = TypeVar("_Recipe", RunConfig, PrmConfig, OrmConfig)
_Node = TypeVar("_Node", bound=Node)


def absolute_paths(config: _Recipe) -> _Recipe:
    """The same recipe with absolute paths; a ``model.path`` that does not exist here stays a hub id."""
    for field in OF_A_RUN if isinstance(config, RunConfig) else OF_A_TRAINING:
        if not hasattr(config, field.partition(".")[0]):
            continue
        if field != "model.path" or Path(config.model.path).exists():
            config = _absolute(config, field)
    return config


def _absolute(node: _Node, field: str) -> _Node:
    name, _, inner = field.partition(".")
    value = getattr(node, name)
    if value is None:
        return node
    new = _absolute(value, inner) if inner else type(value)(Path(value).resolve())
    return node.model_copy(update={name: new})
