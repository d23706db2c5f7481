"""A recipe in a folder of the test's own."""

from pathlib import Path

import pytest

from tests.euphonium.config.minimal import MINIMAL


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path
