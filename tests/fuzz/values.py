"""Strategies of hostile values: what people and programs write where a recipe wants something else."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import strategies as st

from euphonium.config import RunConfig
from orchestrator.commands.reference import fields

FIELDS = sorted({field.path.replace("[]", ".0") for field in fields(RunConfig)})
SECTIONS = sorted({path.rpartition(".")[0] for path in FIELDS} - {""})

NUMBERS = st.sampled_from(
    ["0", "-1", "1", "2", "0.5", "1.5", "1e-4", "1e999", "-0.0", ".nan", ".inf", "-.inf", "1e400", "9" * 30, "9" * 5000,
     "0x" + "f" * 5000, "1_000", "0o17", "1:30", "99999999", "1000000000", "0b", "+", "1e", "--1",
     "9223372036854775807",
     "9223372036854775808", "-9223372036854775809", "4294967296"]
)  # fmt: skip
TEXTS = st.sampled_from(
    ["", "~", "null", "yes", "no", "auto", "never", "a", "a b", "../x", "/", ".", "~/x", "~nobody/x",
     "x" * 300, "x/" * 3000,
     "2026-01-01", "2026-99-99", "=", "<<", '"\\ud800"', '"\\0"', "'nan'", "'inf'", "'-1'", "'1e999'", "ﬁ²٣", "\u2028",
     "/dev/null", "/proc/self/mem", "sprite_icon", "ocr", "os:system", "dance", "sage", "both", "process", "fixed"]
)  # fmt: skip
YAML = st.sampled_from(
    ["[]", "{}", "[1]", "[1, 2]", "[2, 1]", "[0, 99]", "[-1, 3]", "[1, 2, 3]", "[a, b]", "{a: 1}", "{a: {b: {c: 1}}}",
     "&x [*x]", "&x {a: *x}", "*nowhere", "!!python/object:os.system {}", "!!int x", "!!binary x", "!!set {a}",
     "{<<: 3}",
     "{<<: {a: 1}}", "[", "{", "}", "{a: 1, a: 2}", "{[1]: 2}", "{? [a] : b}", "|\n x", "'", '"', "\t", "- a",
     "a: b: c",
     "%TAG", "---", "...", "{kind: sliding, size: 2, allowed: [0, 5]}", "{scale: 0.1}", "{anchor: fixed}",
     "{name: a, type: sprite_icon}", "[{name: a, type: sprite_icon}]", "[" * 150 + "]" * 150, "\x00", "\ufeff"]
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
RAW = st.one_of(NUMBERS, TEXTS, YAML, TEXT)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), TEXT, TEXTS, NUMBERS,
    st.sampled_from([10**12, 10**9, 2**63, -1, 0, 1e-300, 1e300]),
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.one_of(
    st.sampled_from(FIELDS), st.sampled_from(FIELDS), st.sampled_from(SECTIONS),
    st.tuples(st.sampled_from(SECTIONS), TEXT)
    .map(".".join), TEXT, st.sampled_from(["rewards.outcome.99.weight", "rewards.outcome.²", "a..b", ".",
    "extends", "0",
                                           "rewards.outcome." + "9" * 5000]),
)  # fmt: skip
OVERRIDES = st.one_of(
    st.tuples(KEYS, RAW).map("=".join),
    st.tuples(KEYS, VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True))).map("=".join),
    st.text(max_size=40),
)


def entries(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of a tree of mappings and lists."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in pairs for found in [(*path, key), *entries(value, (*path, key))]]
