"""Says which examples are tried."""

import pytest

from tests.fuzz.harness import EXAMPLES, SEED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"fuzz: {EXAMPLES} examples, EUPHONIUM_FUZZ_SEED={SEED}")
