"""Translates pydantic's validation errors into messages that name the recipe's own keys."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from euphonium.text_files import shown

Path = tuple[str | int, ...]
# Errors whose message by pydantic does not say what is wanted.
WORDED = {"path_type": "input should be a path", "int_parsing_size": "input should fit into 64 bits"}


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong with the values that were read.

    Attributes:
        path: the key.
        kind: pydantic's name of the error.
        message: pydantic's message.
        given: the value.
        choice: key of the field that takes values of several kinds, if the error is about one of the kinds.
    """

    path: Path
    kind: str
    message: str
    given: object
    choice: Path | None = None


def mistakes(errors: Sequence[ErrorDetails], values: object) -> list[Mistake]:
    """What is wrong with values: each thing once, where a field takes several kinds of values and none fits.

    Args:
        errors: ``ValidationError.errors()``.
        values: what was validated; it tells keys from the parts that pydantic adds to them for its own types.
    """
    found: list[Mistake] = []
    all_of_them = [_mistake(item, values) for item in errors]
    for mistake in all_of_them:
        others = [other for other in all_of_them if other.choice == mistake.choice]
        if mistake.choice is None or len(others) == 1:
            found.append(mistake)
        elif any(len(other.path) > len(mistake.choice) for other in others):
            # The value is of one of the kinds, with a mistake inside: that it is of no other kind is no news.
            if len(mistake.path) > len(mistake.choice):
                found.append(mistake)
        elif mistake is others[0]:
            messages = ", or ".join(dict.fromkeys(other.message for other in others))
            found.append(Mistake(mistake.choice, mistake.kind, messages, mistake.given))
    return found


def _mistake(item: ErrorDetails, values: Any) -> Mistake:
    path: Path = ()
    choice, here = None, values
    for number, part in enumerate(item["loc"], start=1):
        if _holds(here, part):
            path, here = (*path, part), here[part]
        elif item["type"] == "missing" and number == len(item["loc"]):
            path = (*path, part)
        elif choice is None:
            choice = path
    message = WORDED.get(item["type"], item["msg"].removeprefix("Value error, "))
    return Mistake(path, item["type"], message[:1].lower() + message[1:], item["input"], choice)


def _holds(values: Any, part: str | int) -> bool:
    if isinstance(values, list | tuple):
        return isinstance(part, int) and part < len(values)
    return isinstance(values, Mapping) and part in values


def explain(model: type[BaseModel], mistake: Mistake, root: str = "the recipe") -> str:
    """The message for one mistake: the key, what is wrong with it, and the nearest known key for an unknown one.

    Args:
        model: root of the tree that was read.
        mistake: one of :func:`mistakes`.
        root: what to call the values as a whole, where an error is about no single key.
    """
    path = mistake.path
    key = shown(".".join(map(str, path))) or root
    if mistake.kind == "extra_forbidden":
        known = fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known) or 'none'}"
        return f"unknown key {key!r}; {advice}"
    if mistake.kind == "missing":
        return f"{key!r} is missing"
    given = "" if isinstance(mistake.given, dict | list | BaseModel) else f", got {shown(repr(mistake.given))}"
    return f"{key}: {mistake.message}{given}"


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
