"""Plans of the tests keep their measurements apart from the user's, and share them."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _measurements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(_measurements: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(_measurements))
