"""Generates the reference pages: every field of a recipe, every option of a reward, every metric.

``python -m orchestrator.commands.reference`` writes ``docs/configuration.md``, ``docs/metrics.md`` and
``docs/migration.md``; a test fails when they are not current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Field:
    """One field of a recipe, as a user sees it.

    Attributes:
        path: dotted path from the recipe's root.
        kind: type of its values, in words.
        default: default value as JSON, or ``required``.
        description: its meaning, in a sentence or two.
    """

    path: str
    kind: str
    default: str
    description: str


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[Field]:
    """All fields of a configuration tree, depth first; entries of lists are shown as ``name[]``."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        nested, is_list, optional = _nested(info.annotation)
        value = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        default = "required" if info.is_required() else json.dumps(value, default=str)
        description = " ".join((info.description or "").split())
        if nested is None:
            yield Field(path, _kind(info.annotation), default, description)
            continue
        if optional or is_list:
            yield Field(path, "list" if is_list else "section", default, description)
        yield from fields(nested, f"{path}{'[]' if is_list else ''}.")


def reward_options() -> dict[str, list[Field]]:
    """Options of every built-in reward that has any, by the reward's ``type``."""
    from euphonium.config import OutcomeRewardConfig
    from euphonium.rewards.registry import BUILT_IN, find_reward, options_of

    found = {}
    for kind in BUILT_IN:
        options = options_of(find_reward(OutcomeRewardConfig(name=kind, type=kind)))
        if options is not None and options.model_fields:
            found[kind] = list(fields(options))
    return found


def fields_with_reward_options(model: type[BaseModel]) -> Iterator[Field]:
    """:func:`fields`, and after each ``options`` of outcome rewards those of every type: ``outcome[type=ocr]...``."""
    for field in fields(model):
        yield field
        if field.path.endswith("outcome[].options"):
            for kind, options in reward_options().items():
                place = field.path.replace("outcome[]", f"outcome[type={kind}]")
                yield from (replace(option, path=f"{place}.{option.path}") for option in options)


def _nested(annotation: object) -> tuple[type[BaseModel] | None, bool, bool]:
    """The configuration class in an annotation, whether it is in a list, and whether it may be null."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False, False
    arguments = get_args(annotation)
    is_list, optional = get_origin(annotation) is list, NoneType in arguments
    for argument in arguments:
        nested, inner_list, _ = _nested(argument)
        if nested is not None:
            return nested, is_list or inner_list, optional
    return None, False, False


def _kind(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(_kind(a) for a in arguments)
    if annotation is NoneType:
        return "null"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _kind(arguments[0])
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return f"list of {_kind(arguments[0])}"
    if origin in (list, tuple):
        return f"[{', '.join(_kind(a) for a in arguments)}]"
    if origin is dict:
        return "mapping"
    names = {str: "text", float: "number", int: "integer", bool: "true or false", Path: "path"}
    if isinstance(annotation, type):
        return names.get(annotation, annotation.__name__)
    return str(annotation)


def _table(rows: Iterable[Field]) -> list[str]:
    """Fields as the lines of a Markdown table."""
    return [
        "| field | type | default | meaning |",
        "|---|---|---|---|",
        *(
            f"| `{f.path}` | {f.kind} | {'required' if f.default == 'required' else f'`{f.default}`'} "
            f"| {f.description.replace('|', chr(92) + '|')} |"
            for f in rows
        ),
    ]


def configuration_page() -> str:
    """Text of ``docs/configuration.md``."""
    from euphonium.config import OrmConfig, PrmConfig, RunConfig

    parts = [
        "# Configuration",
        "",
        "Made from `euphonium/config/` and the options of the rewards by `python -m orchestrator.commands.reference`;",
        "do not edit.",
        "",
        "A recipe is a YAML file with these fields. `extends: other.yaml` builds on another recipe, and every field",
        "can be set on the command line: `euphonium train RECIPE pools.rollout.num_actors=4 rollout.group_size=8`.",
        "Entries of lists go by number: `rewards.outcome.0.weight=2`. `options` of outcome rewards are listed",
        "[at the end](#options-of-outcome-rewards).",
    ]
    trees: dict[str, type[BaseModel]] = {"train": RunConfig, "train-prm": PrmConfig, "train-orm": OrmConfig}
    for command, model in trees.items():
        parts += ["", f"## `euphonium {command}`", "", *_table(fields(model))]
    parts += [
        "",
        "## Options of outcome rewards",
        "",
        "What `rewards.outcome[].options` (of `euphonium train-prm`: `outcome[].options`) may hold, by `type`; types",
        "that are not here have no options. What the rewards do is in [rewards.md](rewards.md).",
    ]
    kinds: dict[tuple[Field, ...], list[str]] = {}
    for kind, options in reward_options().items():
        kinds.setdefault(tuple(options), []).append(f"`{kind}`")
    for same, names in kinds.items():
        parts += ["", f"### {', '.join(names)}", "", *_table(same)]
    return "\n".join(parts) + "\n"


def metrics_page() -> str:
    """Text of ``docs/metrics.md``."""
    from orchestrator.report.metrics import METRICS, PREFIX

    parts = [
        "# Metrics",
        "",
        "Made from `orchestrator/report/metrics.py` by `python -m orchestrator.commands.reference`; do not edit.",
        "",
        "Every iteration is one object in `runs/<name>/metrics.jsonl`, one step in TensorBoard (`runs/<name>/events`),",
        "and one set of values at the orchestrator's Prometheus endpoint, whose address a run prints when it starts.",
        "The same gauges appear among Ray's own metrics with the prefix `ray_`. Iteration 0 is the evaluation before",
        "training.",
        "",
        "| key | Prometheus | meaning |",
        "|---|---|---|",
    ]
    parts += [f"| `{m.key}` | `{PREFIX}{m.name}` | {m.help.replace('|', chr(92) + '|')} |" for m in METRICS]
    return "\n".join(parts) + "\n"


def migration_page() -> str:
    """Text of ``docs/migration.md``."""
    from euphonium.config.foreign import projects

    parts = [
        "# Coming from another project",
        "",
        "Made from `euphonium/config/foreign.yaml` by `python -m orchestrator.commands.reference`; do not edit.",
        "",
        "What a setting of another project is called here. The fields are described in",
        "[configuration.md](configuration.md), the methods and how they differ in [methods.md](methods.md).",
        "",
        "None of these names is ever ignored: in a recipe or as an override it is an error that says what the setting",
        "is called here, and `euphonium validate` reports variables of Euphonium's script that are set in the",
        "environment, where they have no effect.",
    ]
    for project in projects().values():
        parts += [
            "",
            f"## {project.title}",
            "",
            f"The names are {project.kind}.",
            "",
            "| there | here | |",
            "|---|---|---|",
        ]
        parts += [
            f"| `{entry.name}` | {', '.join(f'`{field}`' for field in entry.fields) or 'none'} "
            f"| {entry.note.replace('|', chr(92) + '|')} |"
            for entry in project.names
        ]
    return "\n".join(parts) + "\n"


PAGES = {"configuration.md": configuration_page, "metrics.md": metrics_page, "migration.md": migration_page}


def main() -> None:
    """Writes the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
