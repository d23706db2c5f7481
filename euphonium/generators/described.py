"""Generators that are described by their configuration files alone: no weights, no network.

The configurations of published models ship in ``published/<owner>/<name>`` (its README says where each number is
from), so that a recipe can be checked and planned where its model has never been downloaded.
"""

from __future__ import annotations

from pathlib import Path

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.folder import INDEX, MODULAR_INDEX, PipelineFolder, index_name, require_hub_id
from euphonium.generators.generator import Generator
from euphonium.generators.registry import adapter_of

PUBLISHED = Path(__file__).parent / "published"


def describe_generator(config: ModelConfig) -> Generator:
    """Opens the generator that ``model.path`` names from configuration files; nothing is downloaded.

    A local folder's own files are taken where there is one, else those that ship, else what is in the hub's cache.

    Returns:
        The generator; it may lack weights, and then builds networks but loads none.

    Raises:
        ConfigError: there is no folder and no description of this model, or the generator does not support the recipe.
    """
    local = Path(config.path)
    if local.exists():
        return adapter_of(PipelineFolder.find(config), config)
    # A folder that is yet to be put together from published parts goes by its name.
    for shipped in (PUBLISHED / config.path, *sorted(PUBLISHED.glob(f"*/{local.name}"))):
        if index_name(shipped) is not None:
            return adapter_of(PipelineFolder(shipped), config)
    require_hub_id(config.path)
    cached = _cached(config)
    if cached is None:
        raise ConfigError(
            f"model.path: {config.path} is no folder here, and its configuration files do not ship; download it, or "
            f"take one of {', '.join(published_models())}"
        )
    return adapter_of(PipelineFolder(cached), config)


def published_models() -> list[str]:
    """Hub ids of the models whose configuration files ship."""
    folders = (folder for folder in PUBLISHED.glob("*/*") if index_name(folder) is not None)
    return sorted(str(folder.relative_to(PUBLISHED)) for folder in folders)


def _cached(config: ModelConfig) -> Path | None:
    """The model's snapshot in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX, MODULAR_INDEX):
        index = try_to_load_from_cache(config.path, name, revision=config.revision)
        if isinstance(index, str):
            return Path(index).parent
    return None
