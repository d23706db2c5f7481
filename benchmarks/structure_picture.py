"""Draws the packages, the rooms in them, and their imports as SVG; the same sources give the same bytes.

A room is a folder of a package, or the files that lie in the package itself. Arrows are imports, one for all imports
between two rooms or two packages, and those that follow from others are left out: what a box uses is whatever its
arrows lead to, directly or on the way. Imports against the order of the columns would be red.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import permutations, product
from xml.sax.saxutils import escape

from structure_imports import import_graph, module_name
from structure_measures import Source

# Packages by rows, from the top; imports lead down.
ROWS = (("orchestrator",), ("actors", "reward_servers", "learners"), ("euphonium",))
SAYINGS = {
    "orchestrator": "the driver of a run: orders groups and updates, makes advantages of rewards, keeps pools alive",
    "actors": "draw groups of samples, steered at every step by the gradient of the process reward",
    "reward_servers": "process rewards of noisy states and their gradients; outcome rewards of finished samples",
    "learners": "Ray Train and ZeRO-3: the policy, and reward models before or during a run",
    "euphonium": "the library that every role shares; it knows no role and starts nothing",
}
COLOURS = {
    "orchestrator": ("#eef0fb", "#4653a6"),
    "actors": ("#e8f5f2", "#1f7a68"),
    "reward_servers": ("#fdf2e3", "#a4661a"),
    "learners": ("#fbebef", "#a83a5b"),
    "euphonium": ("#f1f2f4", "#4a5361"),
}
AGAINST = "#d0021b"

WIDTH, MARGIN, PAD, GUTTER, LANE = 1400, 14, 14, 30, 9
BETWEEN_ROWS, BETWEEN_PANELS, BETWEEN_BOXES = 44, 14, 12
TITLE, LINE = 50, 15
# Of the monospaced fonts below, the widest has letters of 0.602 em.
FONT, LETTER = "DejaVu Sans Mono, Menlo, Consolas, monospace", 0.602
NAME_SIZE, FILE_SIZE = 13.0, 11.0
MOST_IN_CIRCLES = 7
Edge = tuple[str, str]


def room_of(path: str) -> str:
    """``a/b/c/d.py`` and ``a/b/c.py`` are in the room ``a/b``, ``a/c.py`` is in ``a``."""
    return "/".join(path.split("/")[:-1][:2])


def rooms(sources: Iterable[Source]) -> dict[str, list[str]]:
    """Rooms with the names of what lies in them: files without their suffix, folders with a slash."""
    found: dict[str, set[str]] = {}
    for source in sources:
        room = room_of(source.path)
        first, *deeper = source.path.removeprefix(room + "/").split("/")
        name = f"{first}/" if deeper else first.removesuffix(".py")
        found.setdefault(room, set()).update({name} - {"__init__", "__main__"})
    return {room: sorted(names) for room, names in sorted(found.items()) if names}


def room_imports(sources: list[Source]) -> Counter[Edge]:
    """How many imports lead from one room to another; what ``python -m`` runs is outside of them."""
    room = {module_name(source.path): room_of(source.path) for source in sources}
    graph = import_graph(sources)
    return Counter(
        (room[start], room[end])
        for start in sorted(graph)
        for end in sorted(graph[start])
        if room[start] != room[end] and not start.endswith(".__main__")
    )  # fmt: skip


def against(nodes: list[str], edges: Counter[Edge]) -> set[Edge]:
    """The fewest imports without which none runs in a circle; empty if none does."""
    circular = _circular(edges)
    inside = sorted(set(nodes) & {node for edge in circular for node in edge})
    # Every order of them is tried, which more rooms than these would turn into hours.
    if len(inside) > MOST_IN_CIRCLES:
        return circular

    def backward(order: tuple[str, ...]) -> set[Edge]:
        place = {node: number for number, node in enumerate(order)}
        return {(a, b) for a, b in circular if place[a] > place[b]}

    return min(map(backward, permutations(inside)), key=lambda found: sum(edges[edge] for edge in found))


def _circular(edges: Iterable[Edge]) -> set[Edge]:
    """Edges that are left when what nothing leads to, and what leads nowhere, is taken away again and again."""
    left = set(edges)
    while True:
        starts, ends = {a for a, _ in left}, {b for _, b in left}
        kept = {(a, b) for a, b in left if b in starts and a in ends}
        if kept == left:
            return left
        left = kept


def reduced(edges: Iterable[Edge]) -> list[Edge]:
    """Edges without those that follow from two or more others; the edges must not run in a circle."""
    given = set(edges)
    closure = set(given)
    while longer := {(a, d) for (a, b), (c, d) in product(closure, closure) if b == c} - closure:
        closure |= longer
    implied = {(a, d) for (a, b), (c, d) in product(closure, closure) if b == c}
    return sorted(given - implied)


def columns(nodes: list[str], edges: list[Edge]) -> list[list[str]]:
    """Nodes from left to right, so that edges lead to the right.

    Each is as far right as it can be, and one without edges on the left: nobody builds on it.
    """
    connected = {node for edge in edges for node in edge}

    def height(node: str) -> int:
        return 1 + max((height(b) for a, b in edges if a == node), default=-1)

    most = max(map(height, nodes))
    column = {node: most - height(node) if node in connected else 0 for node in nodes}
    return [sorted(node for node in nodes if column[node] == number) for number in range(most + 1)]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right side."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower side."""
        return self.y + self.height


@dataclass(frozen=True)
class Label:
    """A line of text: where it begins, on which line it stands, and how large it is."""

    x: float
    y: float
    size: float
    text: str
    style: str = ""

    @property
    def box(self) -> Box:
        """What it covers at most."""
        return Box(self.x, self.y - 0.8 * self.size, len(self.text) * LETTER * self.size, self.size)


@dataclass
class Picture:
    """What is drawn; :meth:`svg` draws it."""

    height: float = 0.0
    panels: dict[str, Box] = field(default_factory=dict)
    boxes: dict[str, Box] = field(default_factory=dict)
    labels: list[Label] = field(default_factory=list)
    arrows: list[tuple[str, str]] = field(default_factory=list)

    def svg(self) -> str:
        """The picture as a file."""
        shapes = [f'<rect width="{WIDTH}" height="{self.height:g}" fill="#ffffff"/>']
        for kind, radius, fill in ((self.panels, 10, 0), (self.boxes, 5, 1)):
            for name, box in kind.items():
                light, dark = COLOURS[name.split("/")[0]]
                shapes.append(
                    f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="{radius}" '
                    f'fill="{(light, "#ffffff")[fill]}" stroke="{dark}" stroke-width="{(1.5, 1)[fill]:g}"/>'
                )
        heads = {colour: f"head{number}" for number, colour in enumerate(dict.fromkeys(c for c, _ in self.arrows))}
        defs = [
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for colour, name in heads.items()
        ]
        lines = [
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" marker-end="url(#{heads[colour]})"/>'
            for colour, path in self.arrows
        ]
        texts = [
            f'<text x="{one.x:g}" y="{one.y:g}" font-size="{one.size:g}"{one.style}>{escape(one.text)}</text>'
            for one in self.labels
        ]
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" width="{WIDTH}" '
            f'height="{self.height:g}" font-family="{FONT}" fill="#1d2129">'
        )
        title = "<title>Packages of euphonium and their imports</title>"
        return "\n".join([head, title, "<defs>", *defs, "</defs>", *shapes, *lines, *texts, "</svg>", ""])


def draw(sources: list[Source]) -> str:
    """The picture of some sources as SVG."""
    return lay_out(sources).svg()


def lay_out(sources: list[Source]) -> Picture:
    """Where everything goes.

    Raises:
        ValueError: a package imports one of a row that is not below its own.
    """
    files, edges = rooms(sources), room_imports(sources)
    picture = Picture()
    y = float(MARGIN)
    for row in ROWS:
        grids = {package: _grid(package, files, edges) for package in row}
        room = WIDTH - 2 * MARGIN - BETWEEN_PANELS * (len(row) - 1)
        shares = {package: len(grid.columns) - 0.4 for package, grid in grids.items()}
        x, tallest = float(MARGIN), 0.0
        for package, grid in grids.items():
            width = round(room * shares[package] / sum(shares.values()))
            tallest = max(tallest, _panel(picture, grid, files, Box(x, y, width, 0)))
            x += width + BETWEEN_PANELS
        for package in row:
            panel = picture.panels[package]
            picture.panels[package] = Box(panel.x, panel.y, panel.width, tallest)
        y += tallest + BETWEEN_ROWS
    _between_packages(picture, edges)
    note = (
        "Arrows are imports; those that follow from others are left out. A box without a name: a package's own files."
    )
    if any(colour == AGAINST for colour, _ in picture.arrows):
        note += " Red: a circle."
    picture.labels.append(Label(MARGIN, y - BETWEEN_ROWS + 20, FILE_SIZE, note, ' fill="#4a5361"'))
    picture.height = y - BETWEEN_ROWS + 32
    return picture


@dataclass(frozen=True)
class _Grid:
    package: str
    columns: list[list[str]]
    forward: list[Edge]
    backward: list[Edge]


def _grid(package: str, files: dict[str, list[str]], edges: Counter[Edge]) -> _Grid:
    inside = [room for room in files if room.split("/")[0] == package]
    own = Counter({edge: count for edge, count in edges.items() if set(edge) <= set(inside)})
    backward = against(inside, own)
    forward = reduced(set(own) - backward)
    return _Grid(package, columns(inside, forward), forward, sorted(backward))


def _panel(picture: Picture, grid: _Grid, files: dict[str, list[str]], place: Box) -> float:
    """Draws a package with its rooms at ``place``; answers its height."""
    dark = COLOURS[grid.package][1]
    picture.labels.append(
        Label(place.x + PAD, place.y + 21, 16, grid.package, f' font-weight="bold" fill="{dark}"')
    )  # fmt: skip
    fits = int((place.width - 2 * PAD) / (LETTER * FILE_SIZE))
    picture.labels += [
        Label(place.x + PAD, place.y + 38 + LINE * number, FILE_SIZE, line, ' fill="#4a5361"')
        for number, line in enumerate(textwrap.wrap(SAYINGS[grid.package], fits))
    ]
    top = place.y + TITLE + LINE * (len(textwrap.wrap(SAYINGS[grid.package], fits)) - 1)
    count = len(grid.columns)
    width = (place.width - 2 * PAD - GUTTER * (count - 1)) / count
    bottom = top
    for number, column in enumerate(grid.columns):
        y = top
        for room in column:
            box = _room(picture, room, files, Box(round(place.x + PAD + number * (width + GUTTER)), y, round(width), 0))
            y = box.bottom + BETWEEN_BOXES
            bottom = max(bottom, box.bottom)
    lanes = _arrows_inside(picture, grid, bottom)
    picture.panels[grid.package] = Box(place.x, place.y, place.width, bottom + LANE * lanes + PAD - place.y)
    return picture.panels[grid.package].height


def _room(picture: Picture, room: str, files: dict[str, list[str]], place: Box) -> Box:
    """Draws a room as wide as ``place`` and as high as its names need."""
    fits = int((place.width - 16) / (LETTER * FILE_SIZE))
    titled = "/" in room
    # Where there is nothing but files, there is room for a line each.
    alone = not titled and all(other == room or other.split("/")[0] != room for other in files)
    text = ", ".join(files[room])
    lines = files[room] if alone else textwrap.wrap(text, fits, break_long_words=False, break_on_hyphens=False)
    y = place.y + 4
    if titled:
        y += 15
        picture.labels.append(Label(place.x + 8, y, NAME_SIZE, room.split("/")[1], ' font-weight="bold"'))
    for line in lines:
        y += LINE
        picture.labels.append(Label(place.x + 8, y, FILE_SIZE, line))
    picture.boxes[room] = Box(place.x, place.y, place.width, y + 9 - place.y)
    return picture.boxes[room]


def _arrows_inside(picture: Picture, grid: _Grid, bottom: float) -> int:
    """Draws the imports between the rooms of a package; answers how many lanes under the boxes they took."""
    column = {room: number for number, rooms in enumerate(grid.columns) for room in rooms}
    boxes, dark = picture.boxes, COLOURS[grid.package][1]
    edges = [*grid.forward, *grid.backward]
    lanes = 0
    for a, b in edges:
        leaving = sorted((one for one in edges if one[0] == a), key=lambda one: (boxes[one[1]].y, one))
        coming = sorted((one for one in edges if one[1] == b), key=lambda one: (boxes[one[0]].y, one))
        y0 = round(boxes[a].y + boxes[a].height * (leaving.index((a, b)) + 1) / (len(leaving) + 1), 1)
        y1 = round(boxes[b].y + boxes[b].height * (coming.index((a, b)) + 1) / (len(coming) + 1), 1)
        against_order = (a, b) in grid.backward
        x0, x1 = (boxes[a].x, boxes[b].right) if against_order else (boxes[a].right, boxes[b].x)
        if abs(column[b] - column[a]) == 1:
            middle = (x0 + x1) / 2
            path = f"M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"
        else:
            lanes += 1
            out, lane = -1 if against_order else 1, bottom + LANE * lanes
            off = 8 + 4 * (lanes % 4)
            path = f"M{x0:g} {y0:g}H{x0 + out * off:g}V{lane:g}H{x1 - out * off:g}V{y1:g}H{x1:g}"
        picture.arrows.append((AGAINST if against_order else dark, path))
    return lanes


def _between_packages(picture: Picture, edges: Counter[Edge]) -> None:
    row = {package: number for number, packages in enumerate(ROWS) for package in packages}
    across = {(a.split("/")[0], b.split("/")[0]) for a, b in edges if a.split("/")[0] != b.split("/")[0]}
    for a, b in sorted(across):
        if row[a] >= row[b]:
            raise ValueError(f"{a} imports {b}, which is not below it")
    for a, b in reduced(across):
        above, below = picture.panels[a], picture.panels[b]
        narrow = min(above, below, key=lambda box: box.width)
        x = narrow.x + narrow.width / 2
        picture.arrows.append((COLOURS[a][1], f"M{x:g} {above.bottom:g}V{below.y:g}"))
