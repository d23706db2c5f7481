"""The rule of drawing ahead, under random schedules."""

import random

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.groups.staleness import Bounds, Held, may_draw, may_start, staleness

MANY = Bounds(max_staleness=3, groups=1000, nbytes=10**9)


@given(version=st.integers(0, 50), ahead=st.integers(-5, 10), allowed=st.integers(0, 5))
def test_a_batch_may_start_exactly_within_the_bound(version: int, ahead: int, allowed: int) -> None:
    assert may_start(version + ahead, version, allowed) == (0 <= ahead <= allowed)


def test_strictly_on_policy_is_one_batch_at_a_time() -> None:
    assert [j for j in range(10) if may_start(j, 4, 0)] == [4]


@given(
    allowed=st.integers(0, 3),
    per_iteration=st.integers(1, 4),
    room=st.integers(1, 20),
    nbytes=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 10), min_size=40, max_size=40),
    actors=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_any_schedule_makes_progress_within_the_bounds(
    allowed: int, per_iteration: int, room: int, nbytes: int, sizes: list[int], actors: int, seed: int
) -> None:
    """Actors draw in order of the groups and finish in any order; the learner trains whenever a batch is whole."""
    rng = random.Random(seed)
    bounds = Bounds(max_staleness=allowed, groups=room, nbytes=nbytes)
    version, begun, iterations = 0, 0, 6
    drawing: dict[int, int] = {}  # group -> version that draws it
    held: dict[int, int] = {}  # group -> bytes, 0 while under way
    drawn: dict[int, int] = {}
    largest = 0
    order: list[int] = []
    for _ in range(10_000):
        if version == iterations:
            break
        moves = []
        count = Held(groups=len(held), nbytes=sum(size or largest for size in held.values()), each=largest)
        iteration = begun // per_iteration
        free = len(drawing) < actors and iteration < iterations
        if free and may_draw(iteration, version, bounds, count):
            moves.append("draw")
        if drawing:
            moves.append("finish")
        batch = range(version * per_iteration, (version + 1) * per_iteration)
        if all(group in drawn for group in batch):
            moves.append("train")
        assert moves, "nothing can move: deadlock"
        move = rng.choice(moves)
        if move == "draw":
            if iteration > version:
                assert count.groups < room
                assert count.nbytes + largest <= nbytes
            drawing[begun], held[begun] = version, 0
            begun += 1
        elif move == "finish":
            group = rng.choice(list(drawing))
            drawn[group] = drawing.pop(group)
            held[group] = sizes[group]
            largest = max(largest, sizes[group])
        else:
            for group in batch:
                assert 0 <= staleness(version, drawn[group]) <= allowed
                del held[group]
                order.append(group)
            version += 1
    assert version == iterations
    assert order == list(range(iterations * per_iteration)), "every group is trained once, in order"


def test_groups_of_the_next_iteration_need_no_room() -> None:
    full = Held(groups=1000, nbytes=10**9, each=10)
    assert may_draw(4, 4, MANY, full)
    assert not may_draw(5, 4, MANY, full)
    assert may_draw(5, 4, MANY, Held(groups=3, nbytes=30, each=10))
