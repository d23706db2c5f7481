"""What every fuzz test demands of a refusal, and how many examples it tries.

``EUPHONIUM_FUZZ_EXAMPLES`` and ``EUPHONIUM_FUZZ_SEED`` set the number of examples and their seed; the same two numbers
try the same examples again. A test that fails prints the smallest example that it found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, seed, settings

from euphonium.errors import EuphoniumError

EXAMPLES = int(os.environ.get("EUPHONIUM_FUZZ_EXAMPLES", "200"))
SEED = int(os.environ.get("EUPHONIUM_FUZZ_SEED", "20260101"))
# What tells people what to do; each message has to have one of these.
REMEDY = re.compile(
    r"; |should|must|did you mean|known here|is missing|give |takes|give one|correct|needs|set |exceeds|of the form|"
    r"has weight 0|is taken|differ|a recipe is a mapping|exactly one|at least|at most|between|outside|ends after"
)
LONGEST_LINE, MOST_LINES = 2500, 80

_F = TypeVar("_F", bound=Callable[..., Any])
T = TypeVar("T")


def fuzz(share: float = 1.0) -> Callable[[_F], _F]:
    """Marks a fuzz test; ``share`` of the examples is tried, for what takes long."""

    def mark(test: _F) -> _F:
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example]
        configured = settings(
            max_examples=max(20, int(EXAMPLES * share)), deadline=None, database=None, suppress_health_check=checks,
            print_blob=True,
        )  # fmt: skip
        return pytest.mark.timeout(7200)(seed(SEED)(configured(test)))

    return mark


def taken_or_refused(call: Callable[[], T], names: Sequence[str], folder: Path) -> T | None:
    """The result of a call, or None if it was refused as it should be: nothing in the folder changes either way.

    Args:
        call: what is tried.
        names: what a refusal may name: the file, or a field that exists.
        folder: watched.
    """
    before = contents(folder)
    try:
        return call()
    except EuphoniumError as error:
        assert_helps(str(error), names)
        return None
    finally:
        assert contents(folder) == before


def assert_helps(message: str, names: Sequence[str]) -> None:
    """Checks that a message is one paragraph that can be printed, names what is wrong, and says what to do."""
    lines = message.split("\n")
    assert all(line.strip() for line in lines), f"an empty line in {message!r}"
    assert len(lines) <= MOST_LINES, f"{len(lines)} lines"
    assert max(map(len, lines)) <= LONGEST_LINE, message[:LONGEST_LINE]
    assert "".join(lines).isprintable(), f"not printable: {message!r}"
    assert any(name in message for name in names), f"names none of {names}: {message!r}"
    # The first line may be the heading of a list.
    for line in lines[1:] or lines:
        assert REMEDY.search(line), f"says nothing of what to do: {line!r}"


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and what is in them."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}
