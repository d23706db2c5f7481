"""The picture of the architecture: true to the imports, legible, and the committed one up to date."""

import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from structure_measures import Source, load
from structure_picture import WIDTH, Box, against, columns, draw, lay_out, reduced, room_imports, rooms

ROOT = Path(__file__).parent.parent.parent


def test_the_committed_picture_is_up_to_date() -> None:
    assert (ROOT / "docs" / "architecture.svg").read_text() == draw(load(ROOT)), "run `make picture`"


def test_no_folder_imports_in_a_circle_with_another() -> None:
    edges = room_imports(load(ROOT))
    assert against(sorted({room for edge in edges for room in edge}), edges) == set()


@pytest.fixture
def sources() -> list[Source]:
    files = {
        "orchestrator/run.py": "from orchestrator.pools import crew\nfrom learners.policy.loop import f",
        "orchestrator/pools/crew.py": "def f():\n    from actors.sampler import g",
        "orchestrator/report/charts.py": "import torch",
        "actors/sampler.py": "from euphonium.wire.weights import store\nfrom euphonium.errors import E",
        "reward_servers/prm.py": "from euphonium.wire import records",
        "learners/policy/loop.py": "import euphonium.wire.records",
        "euphonium/wire/records.py": "from euphonium.errors import E",
        "euphonium/wire/weights/store.py": "x = 1",
        "euphonium/errors.py": "x = 1",
    }
    return [Source.of(path, text) for path, text in files.items()]


def test_rooms_are_the_folders_of_a_package_and_the_package_itself(sources: list[Source]) -> None:
    assert rooms(sources)["orchestrator"] == ["run"]
    assert rooms(sources)["euphonium/wire"] == ["records", "weights/"]
    assert room_imports(sources) == {
        ("orchestrator", "orchestrator/pools"): 1, ("orchestrator", "learners/policy"): 1,
        ("orchestrator/pools", "actors"): 1, ("actors", "euphonium/wire"): 1, ("actors", "euphonium"): 1,
        ("reward_servers", "euphonium/wire"): 1, ("learners/policy", "euphonium/wire"): 1,
        ("euphonium/wire", "euphonium"): 1,
    }  # fmt: skip


def test_arrows_that_follow_from_others_are_left_out() -> None:
    assert reduced([("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"), ("a", "d"), ("e", "d")]) == [
        ("a", "b"), ("b", "c"), ("c", "d"), ("e", "d"),
    ]  # fmt: skip


def test_arrows_lead_to_the_right_and_what_nobody_imports_is_on_the_left() -> None:
    assert columns(["a", "b", "c", "d", "e"], [("a", "b"), ("b", "c"), ("d", "c")]) == [["a", "e"], ["b", "d"], ["c"]]


def test_of_a_circle_the_fewest_imports_are_against_the_order() -> None:
    assert against(["a", "b", "c"], Counter({("a", "b"): 5, ("b", "c"): 2, ("c", "a"): 3})) == {("b", "c")}
    assert against(["a", "b", "c"], Counter({("a", "b"): 1, ("b", "c"): 1, ("a", "c"): 1})) == set()


def test_one_circle_among_many_rooms_is_found_at_once() -> None:
    chain = {(f"room{n:02}", f"room{n + 1:02}"): 1 for n in range(19)}
    edges = Counter({**chain, ("room05", "room04"): 2})
    assert against([f"room{n:02}" for n in range(20)], edges) == {("room04", "room05")}


def test_of_a_circle_through_many_rooms_all_imports_are_named() -> None:
    nodes = [f"room{n:02}" for n in range(20)]
    edges = Counter(dict.fromkeys(zip(nodes, [*nodes[1:], nodes[0]], strict=True), 1))
    assert against(nodes, edges) == set(edges)


def test_an_import_that_leads_up_is_refused(sources: list[Source]) -> None:
    wrong = Source.of("euphonium/files.py", "import actors.sampler")
    with pytest.raises(ValueError, match="euphonium imports actors"):
        draw([*sources, wrong])


def test_a_circle_is_red_and_said(sources: list[Source]) -> None:
    assert "Red: a circle" not in draw(sources)
    back = Source.of("orchestrator/pools/roster.py", "from orchestrator.run import f")
    assert "Red: a circle" in draw([*sources, back])


def test_the_picture_is_xml_and_the_same_whatever_the_order_of_the_files(sources: list[Source]) -> None:
    ElementTree.fromstring(draw(sources))
    assert draw(sources) == draw(sources[::-1])


def inside(inner: Box, outer: Box) -> bool:
    return (
        outer.x <= inner.x and inner.right <= outer.right and outer.y <= inner.y and inner.bottom <= outer.bottom
    )  # fmt: skip


def apart(one: Box, other: Box) -> bool:
    return one.right <= other.x or other.right <= one.x or one.bottom <= other.y or other.bottom <= one.y


def test_nothing_overlaps_in_the_picture_of_this_checkout() -> None:
    picture = lay_out(load(ROOT))
    labels = [label.box for label in picture.labels]
    boxes, panels = [*picture.boxes.values()], [*picture.panels.values()]
    for kind in (labels, boxes, panels):
        assert all(apart(one, other) for one, other in combinations(kind, 2))
    page = Box(0, 0, WIDTH, picture.height)
    assert all(inside(label, page) for label in labels)
    for label in labels:
        for place in (*boxes, *panels):
            assert apart(label, place) or inside(label, place)
    for room, box in picture.boxes.items():
        assert inside(box, picture.panels[room.split("/")[0]])


def test_no_arrow_runs_through_a_box_of_this_checkout() -> None:
    picture = lay_out(load(ROOT))
    assert picture.arrows
    for _, path in picture.arrows:
        corners = corners_of(path)
        for (x0, y0), (x1, y1) in pairwise(corners):
            # The hull of a curve is the rectangle of its ends; arrows may touch the boxes that they join.
            hull = Box(min(x0, x1) + 1, min(y0, y1), abs(x1 - x0) - 2, abs(y1 - y0))
            assert all(apart(hull, box) for box in picture.boxes.values()), path


def corners_of(path: str) -> list[tuple[float, float]]:
    """Points that a path goes through, without the control points of its curve."""
    x = y = 0.0
    points = []
    for command, numbers in re.findall(r"([MHVC])([-\d. ]+)", path):
        values = [float(number) for number in numbers.split()]
        x = values[-1] if command == "H" else x if command == "V" else values[-2]
        y = values[-1] if command != "H" else y
        points.append((x, y))
    return points
