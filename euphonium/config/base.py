"""The base class of all configuration models, and field types that several of them use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from euphonium.errors import ConfigError

NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# What every generator of random numbers takes.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Steps of a sampler: schedules of more are tables of hours, and mistakes.
Steps = Annotated[int, Field(ge=1, le=10_000)]
Fraction = Annotated[float, Field(gt=0, le=1)]
# Decay rate of a moving average; 0 keeps no history.
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
LONGEST_NAME, LONGEST_PATH = 255, 4095
# What a recipe leaves to the plan, which replaces it before anything starts (orchestrator/plan/choice.py).
Auto = Literal["auto"]
# How many samples, states, pairs or transitions go into a pass.
PassSize = PositiveInt | Auto
# Fields that a recipe left to the plan, each with what was written, what was chosen, and why.
Planned = dict[str, str]

_T = TypeVar("_T")


def chosen(value: _T | Auto, field: str) -> _T:
    """The value of a field that a recipe may leave to the plan, for those who compute with it.

    Args:
        value: of the field.
        field: its name, for the error.

    Raises:
        ConfigError: nothing has chosen one.
    """
    if value == "auto":
        raise ConfigError(f"{field}: auto is chosen by `euphonium train` and others at their start; give a number here")
    return value


def expanded(path: str) -> str:
    """A path that a user gave, with ``~`` replaced by the home folder.

    Raises:
        ValueError: no file can have it: it is empty, or too long, or holds a character that paths cannot.
    """
    if not path:
        raise ValueError("this path is empty; give one")
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character; leave it out")
    if "\n" in path or "\r" in path:
        raise ValueError("a path with a line break is a slip of a script; leave the line break out")
    if path.startswith("~"):
        whole = os.path.expanduser(path)
        if whole.startswith("~"):
            raise ValueError(f"there is no home folder for {path.partition('/')[0]!r}; write the path out")
        path = whole
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("a path cannot hold half of a character; write the character itself") from None
    if len(encoded) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in encoded.split(b"/")):
        raise ValueError(f"too long: file names have at most {LONGEST_NAME} bytes, paths {LONGEST_PATH}")
    return path


def user_path(path: str | Path, field: str = "") -> Path:
    """A path of the command line or of a recipe's ``extends``, as :func:`expanded` leaves it.

    Args:
        path: the path.
        field: what names it, for errors.

    Raises:
        ConfigError: no file can have it.
    """
    try:
        return Path(expanded(str(path)))
    except ValueError as error:
        raise ConfigError(f"{field and field + ': '}{str(path)[:LONGEST_NAME]!r}: {error}") from error


# A file or folder; and one that may be the name of something on the hub instead.
UserPath = Annotated[Path, AfterValidator(lambda path: Path(expanded(str(path))))]
PathOrHubId = Annotated[str, AfterValidator(expanded)]


class Node(BaseModel):
    """Base class of all configuration models: unknown keys are errors, and instances are immutable.

    Numbers are finite everywhere: NaN and infinity are refused.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
