"""Names of the same settings in other projects, so that a setting brought from there is never silently ignored.

The tables lie in ``foreign.yaml``: ``docs/migration.md`` is made from them, the loader answers an unknown key with
them, and ``euphonium validate`` finds variables in the environment that would have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class ForeignName:
    """One setting of another project.

    Attributes:
        name: as it is written there.
        fields: fields of a recipe that it becomes; none if there is no counterpart.
        note: how values translate, or why there is no counterpart.
    """

    name: str
    fields: tuple[str, ...] = ()
    note: str = ""

    @property
    def advice(self) -> str:
        """What to do instead, as a clause."""
        if not self.fields:
            return f"has no counterpart here: {self.note}"
        return f"is {' and '.join(self.fields)} here" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Project:
    """A project and its settings.

    Attributes:
        title: its name.
        kind: what its settings are called.
        names: the settings.
    """

    title: str
    kind: str
    names: tuple[ForeignName, ...]


@lru_cache(maxsize=1)
def projects() -> Mapping[str, Project]:
    """The tables of ``foreign.yaml`` by their keys there: ``euphonium``, ``dance_grpo``, ``flow_grpo``."""
    held = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text(encoding="utf-8"))
    return {
        key: Project(entry["title"], entry["kind"], tuple(map(_name, entry["names"]))) for key, entry in held.items()
    }


def _name(row: Mapping[str, str | list[str]]) -> ForeignName:
    return ForeignName(str(row["name"]), tuple(row.get("fields", ())), str(row.get("note", "")))


@lru_cache(maxsize=1)
def _index() -> tuple[dict[str, tuple[Project, ForeignName]], dict[str, tuple[Project, ForeignName]]]:
    """All names in normal form, and those that go by the last part of a dotted one."""
    whole: dict[str, tuple[Project, ForeignName]] = {}
    last: dict[str, tuple[Project, ForeignName]] = {}
    for project in projects().values():
        for entry in project.names:
            name = _normal(entry.name)
            whole.setdefault(name, (project, entry))
            last.setdefault(name.rpartition(".")[2], (project, entry))
    return whole, last


def _normal(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower().removeprefix("config.")


def advice(path: Sequence[str | int], value: object) -> list[str]:
    """What an unknown key stands for, if it is a setting of another project.

    Args:
        path: of the unknown key in the recipe.
        value: what it was set to; a mapping is searched for names such as ``sample.noise_level``.

    Returns:
        One sentence for each setting that was recognised.
    """
    whole, _ = _index()
    found = []
    for name in _leaves(".".join(map(str, path)), value):
        match = whole.get(_normal(name))
        if match is not None:
            project, entry = match
            found.append(f"{name} of {project.title} {entry.advice}")
    return found


def similar(key: str) -> str | None:
    """What a key means elsewhere that is only the last part of a setting's name there, or stands in another place."""
    _, last = _index()
    match = last.get(_normal(key))
    return f"{match[1].name} of {match[0].title} {match[1].advice}" if match is not None else None


def _leaves(prefix: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    else:
        yield prefix


def ineffective_variables(environment: Mapping[str, str]) -> list[str]:
    """Sentences on Euphonium's script variables in an environment, which configures nothing here.

    Only upper-case names are looked for: ``lr`` and its like mean something else to somebody else.
    """
    return [
        f"{entry.name}={environment[entry.name]} {entry.advice}"
        for entry in projects()["euphonium"].names
        if entry.name.isupper() and entry.name in environment
    ]
