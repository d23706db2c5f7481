"""Where a run stands, and what the next turn of its loop has to do."""

from __future__ import annotations

from dataclasses import dataclass

from euphonium.config import RunConfig
from orchestrator.state.checkpoints import RunState


@dataclass
class Position:
    """Where a run stands now. Only the run loop changes it; the other parts of the run read it.

    Attributes:
        state: progress of the run.
        history: history of the weights, see :class:`euphonium.wire.roles.RolloutContext`.
    """

    state: RunState
    history: int = 0

    @property
    def iteration(self) -> int:
        """Number of iterations done, which is also the policy version."""
        return self.state.iteration


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the run loop, which does one iteration.

    Attributes:
        number: number of the iteration, from 1.
        last: whether it is the run's last.
        evaluates: whether it ends with an evaluation.
        saves: whether it writes a checkpoint.
    """

    number: int
    last: bool
    evaluates: bool
    saves: bool


def next_turn(config: RunConfig, position: Position) -> Turn:
    """The next turn: its number, and whether it evaluates and saves.

    Example:
        >>> from euphonium.config import CheckpointConfig, EvaluationConfig
        >>> config = RunConfig.model_construct(
        ...     iterations=5, evaluation=EvaluationConfig(every=2), checkpoint=CheckpointConfig(every=3)
        ... )
        >>> for done in range(5):
        ...     turn = next_turn(config, Position(RunState(iteration=done, next_group=0, world_size=1)))
        ...     print(turn.number, "evaluates" * turn.evaluates, "saves" * turn.saves)
        1
        2 evaluates
        3  saves
        4 evaluates
        5 evaluates saves
    """
    number = position.iteration + 1
    last = number == config.iterations
    return Turn(
        number=number,
        last=last,
        evaluates=last or number % config.evaluation.every == 0,
        saves=last or number % config.checkpoint.every == 0,
    )
