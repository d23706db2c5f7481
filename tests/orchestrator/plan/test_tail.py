"""How an iteration's last groups are cut: what the cuts are, and how long drawing then takes."""

import heapq
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from orchestrator.plan.tail import Tail, tail_of, tail_of_recipe

MakeConfig = Callable[..., RunConfig]


def drawn_in(tail: Tail, groups: int, actors: int, group_size: int) -> float:
    """Time until everything is drawn, in the order of the groups by whoever is idle; a whole group takes 1."""
    works = [1.0] * (groups - tail.groups)
    works += [(end - first) / group_size for first, end in tail.parts] * tail.groups
    idle_from = [0.0] * actors
    for work in works:
        heapq.heappush(idle_from, heapq.heappop(idle_from) + work)
    return max(idle_from)


@given(
    groups=st.integers(1, 40), actors=st.integers(1, 20), group_size=st.integers(2, 24), piece=st.integers(1, 24),
)  # fmt: skip
def test_parts_are_whole_pieces_of_the_group_and_take_no_longer_than_it_says(
    groups: int, actors: int, group_size: int, piece: int
) -> None:
    tail = tail_of(groups, actors, group_size, min(piece, group_size))
    assert tail.waves <= -(-groups // actors)
    assert drawn_in(tail, groups, actors, group_size) <= tail.waves * (1 + 1e-9)
    assert bool(tail.groups) == bool(tail.parts)
    if tail.parts:
        assert tail.groups == groups % actors
        assert tail.waves < -(-groups // actors)
        ends = [end for _, end in tail.parts]
        assert [first for first, _ in tail.parts] == [0, *ends[:-1]]
        assert ends[-1] == group_size
        assert all(first % piece == 0 < end - first for first, end in tail.parts)


@pytest.mark.parametrize(
    ("groups", "actors", "size", "piece", "parts", "waves"),
    [
        (12, 8, 8, 1, ((0, 4), (4, 8)), 1.5),
        (4, 8, 8, 1, ((0, 4), (4, 8)), 0.5),
        (1, 8, 8, 1, tuple((i, i + 1) for i in range(8)), 1 / 8),
        (3, 2, 3, 1, ((0, 1), (1, 3)), 1 + 2 / 3),
        # Passes of four stay whole, however many actors there are.
        (1, 8, 8, 4, ((0, 4), (4, 8)), 0.5),
        (1, 2, 8, 3, ((0, 3), (3, 8)), 5 / 8),
        # Five groups fill eight actors for five samples each, or for eight.
        (5, 8, 8, 1, tuple((i, i + 1) for i in range(8)), 5 / 8),
        (5, 8, 8, 4, (), 1),
        (8, 8, 8, 1, (), 1),
        (3, 1, 8, 1, (), 3),
    ],
)
def test_the_fewest_parts_that_make_the_tail_shortest(
    groups: int, actors: int, size: int, piece: int, parts: tuple[tuple[int, int], ...], waves: float
) -> None:
    tail = tail_of(groups, actors, size, piece)
    assert (tail.parts, tail.waves) == (parts, pytest.approx(waves))


def test_a_recipe_cuts_between_its_passes_or_anywhere_within_one(make_config: MakeConfig) -> None:
    def parts(*overrides: str) -> tuple[tuple[int, int], ...]:
        sizes = ("rollout.group_size=8", "rollout.prompts_per_iteration=5", "pools.rollout.num_actors=4")
        return tail_of_recipe(make_config(*sizes, *overrides)).parts

    on = "rollout.split_tail=true"
    assert parts() == ()
    assert parts(on) == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert parts(on, "rollout.samples_per_pass=8") == parts(on)
    assert parts(on, "rollout.samples_per_pass=4") == ((0, 4), (4, 8))
    assert parts(on, "pools.rollout.num_actors=5") == ()


def test_actors_that_run_ahead_have_no_tail(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.split_tail.*rollout\.max_staleness \(1\)"):
        make_config("rollout.split_tail=true", "rollout.max_staleness=1")
