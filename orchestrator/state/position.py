"""Where a run stands, and what its next turn has to do."""

from __future__ import annotations

from dataclasses import dataclass

from euphonium.config import RunConfig
from orchestrator.state.checkpoints import RunState


@dataclass
class Position:
    """Where a run stands now; the run loop moves it, its parts read it.

    Attributes:
        state: what is done.
        history: of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
    """

    state: RunState
    history: int = 0

    @property
    def iteration(self) -> int:
        """Iterations done, which is also the policy's version."""
        return self.state.iteration


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the run loop.

    Attributes:
        number: of the iteration, from 1.
        last: no other follows.
        evaluates: it ends with an evaluation.
        saves: it ends with a checkpoint.
    """

    number: int
    last: bool
    evaluates: bool
    saves: bool


def next_turn(config: RunConfig, position: Position) -> Turn:
    """What the iteration after those that are done has to do."""
    number = position.iteration + 1
    last = number == config.iterations
    return Turn(
        number=number,
        last=last,
        evaluates=last or number % config.evaluation.every == 0,
        saves=last or number % config.checkpoint.every == 0,
    )
