"""Pipelines of every family in tiny configurations."""

from pathlib import Path

import pytest

from tests.euphonium.generators.tiny_pipelines import Folders, build_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folder of a saved pipeline, by its class."""
    made: dict[str, Path] = {}

    def folder(pipeline_class: str) -> Path:
        if pipeline_class not in made:
            made[pipeline_class] = tmp_path_factory.mktemp(pipeline_class)
            build_pipeline(pipeline_class).save_pretrained(made[pipeline_class])
        return made[pipeline_class]

    return folder
