"""Translates pydantic's validation errors into messages that name the recipe's own keys."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]


def path_of(item: ErrorDetails) -> Path:
    """Path of the value that an error is about, without the parts that pydantic adds for its own types."""
    return tuple(p for p in item["loc"] if not (isinstance(p, str) and p.startswith(("function-", "is-inst", "[key]"))))


def explain(model: type[BaseModel], item: ErrorDetails, root: str = "the recipe") -> str:
    """The message for one error: the key, what is wrong with it, and the nearest known key for an unknown one.

    Args:
        model: root of the tree that was read.
        item: one entry of ``ValidationError.errors()``.
        root: what to call the values as a whole, where an error is about no single key.
    """
    path = path_of(item)
    key = ".".join(map(str, path)) or root
    if item["type"] == "extra_forbidden":
        known = fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known) or 'none'}"
        return f"unknown key {key!r}; {advice}"
    if item["type"] == "missing":
        return f"{key!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict | list | BaseModel) else f", got {item['input']!r}"
    return f"{key}: {message[0].lower() + message[1:]}{given}"


def fields_at(model: type[BaseModel], path: Path) -> list[str]:
    """Names of the fields of the node at ``path``."""
    node: type[BaseModel] = model
    for part in path:
        if isinstance(part, int) or part not in node.model_fields:
            continue
        candidates: list[object] = [node.model_fields[part].annotation]
        while candidates:
            kind = candidates.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                node = kind
                break
            candidates += get_args(kind)
    return list(node.model_fields)
