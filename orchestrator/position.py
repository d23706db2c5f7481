"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.checkpoints import RunState


@dataclass
class Position:
    """Where a run stands now; the run loop moves it, its parts read it.

    Attributes:
        state: what is done.
        history: ordinal of the weights' history. It goes up when the run goes back to a checkpoint, because versions of
            an earlier history are other weights.
    """

    state: RunState
    history: int = 0
