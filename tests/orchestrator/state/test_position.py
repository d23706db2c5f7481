"""What each turn of a run has to do."""

from collections.abc import Callable

import pytest

from euphonium.config import RunConfig
from orchestrator.state.checkpoints import RunState
from orchestrator.state.position import Position, Turn, next_turn


@pytest.mark.parametrize(
    ("done", "evaluates", "saves", "last"),
    [(0, False, False, False), (1, True, False, False), (2, False, True, False), (5, True, True, False),
     (6, True, True, True)],
)  # fmt: skip
def test_a_turn_evaluates_and_saves_when_its_number_says_so_and_always_at_the_end(
    make_config: Callable[..., RunConfig], done: int, evaluates: bool, saves: bool, last: bool
) -> None:
    config = make_config("iterations=7", "evaluation.every=2", "checkpoint.every=3")
    turn = next_turn(config, Position(RunState(iteration=done, next_group=0, world_size=1)))
    assert turn == Turn(number=done + 1, last=last, evaluates=evaluates, saves=saves)
