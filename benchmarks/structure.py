"""How the sources are built, in numbers: one table, a column for each checkout.

    python benchmarks/structure.py                      # this checkout
    python benchmarks/structure.py ../before .          # two of them, side by side
    python benchmarks/structure.py --remote-types       # has mypy judge the calls across processes; takes minutes
    python benchmarks/structure.py --json               # the same for programs, with everything that has a name
    python benchmarks/structure.py --picture docs/architecture.svg

Files are parsed, not imported, so a checkout needs no environment and may be of any age. Measured are the packages
that its own pyproject.toml has type-checked. What each number counts is said where it is counted:
structure_measures.py, structure_imports.py, structure_remote.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from structure_imports import circles, import_graph
from structure_measures import (
    FUNCTION_LINES,
    PARAMETERS,
    any_count,
    class_sizes,
    docstrings,
    load,
    long_functions,
    repeated_defaults,
    sizes,
    undocumented,
    wide_functions,
)
from structure_picture import draw
from structure_remote import remote_calls, remote_types

ROOT = Path(__file__).resolve().parent.parent
NAMED = 5


@dataclass(frozen=True)
class Row:
    """One measure of one checkout.

    Attributes:
        label: what is counted.
        value: the number, or several as people read them.
        names: what was counted, where a name helps.
    """

    label: str
    value: str | int
    names: list[str]


def measure(checkout: Path, *, remote: bool) -> list[Row]:
    """All measures of a checkout, in the order of the table."""
    sources = load(checkout)
    lines = sum(source.lines for source in sources)
    size = sizes(sources, named=NAMED)
    long, wide = long_functions(sources), wide_functions(sources)
    anys = sum(map(any_count, sources))
    rings = circles(import_graph(sources))
    classes = class_sizes(sources)
    defaults = repeated_defaults(sources)
    bare, public = undocumented(sources)
    texts = [" ".join(text.split()) for source in sources for text in docstrings(source)]
    return [
        Row("files", len(sources), []),
        Row("lines", lines, []),
        Row("lines without blanks and comments", sum(source.code_lines for source in sources), []),
        Row("lines a file: median", f"{size.median:g}", []),
        Row("lines a file: 9 of 10 at most", size.p90, []),
        Row("lines of the largest file", size.largest[0][0], _listed(size.largest)),
        Row(f"functions over {FUNCTION_LINES} lines", len(long), _listed(long)),
        Row(f"functions of more than {PARAMETERS} parameters", len(wide), _listed(wide)),
        Row("Any", anys, []),
        Row("Any per thousand lines", f"{1000 * anys / lines:.1f}", []),
        *_remote_rows(checkout, sum(len(remote_calls(source)) for source in sources), remote=remote),
        Row("circles of imports", len(rings), [" ".join(ring) for ring in rings]),
        Row("largest class: lines", classes[0].lines, [str(one) for one in classes[:NAMED]]),
        Row("most methods of a class", max(one.methods for one in classes), []),
        Row("most attributes of a class", max(one.attributes for one in classes), []),
        Row("defaults written twice", len(defaults), defaults),
        Row("public names with a docstring", f"{100 * (public - len(bare)) / public:.1f} %", bare),
        Row("docstrings", len(texts), []),
        Row('docstrings that begin with "See "', sum(text.startswith("See ") for text in texts), []),
        Row('docstrings with "Args as described"', sum("Args as described" in text for text in texts), []),
    ]


def _listed(found: list[tuple[int, str]]) -> list[str]:
    return [f"{number} {place}" for number, place in found]


def _remote_rows(checkout: Path, calls: int, *, remote: bool) -> list[Row]:
    if not remote:
        return [Row("calls across processes", calls, [])]
    kinds, places = remote_types(checkout)
    return [
        Row("calls across processes", calls, places),
        Row("  without a type", kinds["untyped"], []),
        Row("  with an Any in their type", kinds["partly"], []),
    ]


def table(columns: dict[str, list[Row]]) -> str:
    """The measures as text, a column a checkout, and below it the names."""
    labels = [row.label for row in next(iter(columns.values()))]
    cells = [["", *columns]] + [
        [label, *(str(rows[number].value) for rows in columns.values())] for number, label in enumerate(labels)
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    first, *others = widths
    text = [
        line[0].ljust(first) + "".join("  " + cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))
        for line in cells
    ]
    for name, rows in columns.items():
        for row in rows:
            if row.names:
                text += ["", f"{name}: {row.label}", *(f"  {one}" for one in row.names)]
    return "\n".join(text)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--remote-types", action="store_true", help="have mypy judge the calls across processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="draw the packages and their imports instead")
    options = parser.parse_args()
    if options.picture is not None:
        options.picture.write_text(draw(load(options.checkouts[0])))
        return
    columns = {str(checkout): measure(checkout, remote=options.remote_types) for checkout in options.checkouts}
    if options.json:
        print(json.dumps({name: [asdict(row) for row in rows] for name, rows in columns.items()}, indent=2))
    else:
        print(table(columns))


if __name__ == "__main__":
    main()
