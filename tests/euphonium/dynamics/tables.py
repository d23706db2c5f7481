"""What holds for the table of every law."""

from collections.abc import Callable

import torch

from euphonium.dynamics import StepTable, StepTableError


def built_or_refused(build: Callable[[], StepTable]) -> StepTable | None:
    """A table, with finite columns; None if it was refused, by the name of a step."""
    table, refusal = None, ""
    try:
        table = build()
    except StepTableError as error:
        refusal = str(error)
    if table is None:
        assert "step " in refusal
        return None
    for column in (table.coef_x, table.coef_v, table.std):
        assert torch.isfinite(column).all()
    return table
