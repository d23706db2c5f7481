"""What ``train-prm`` and ``train-orm`` check before they start anything; ``validate`` checks the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from euphonium.config import OrmConfig, PreferencesConfig, PrmConfig
from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator
from euphonium.generators.embeddings import check_embeddings
from euphonium.generators.generator import Generator
from euphonium.generators.pictures import check_pictures, require_pictures
from euphonium.generators.prompt_length import warn_of_cut_prompts
from euphonium.generators.registry import open_generator
from euphonium.locks import refuse_unwritable
from euphonium.rewards.registry import build_rewards
from learners.engine.options import check_options
from learners.rewards.preference_files import PreferenceTable, open_preferences
from orchestrator.commands.launch import check_prompts, refuse_ineffective_variables
from orchestrator.groups.prompts import read_prompts, refuse_shared_prompts

PARTS = ("train", "held_out")


def check_prm(config: PrmConfig, family: Generator | None = None) -> dict[str, Any]:
    """Checks a recipe of ``train-prm`` without starting anything: a mistake shows before samples are drawn for hours.

    Args:
        config: the recipe.
        family: its generator, where it is open already; else it is opened, and downloaded if need be.

    Returns:
        What will be trained, as text by name.

    Raises:
        ConfigError: the training cannot work; names the field, and what to do.
    """
    _check_surroundings(config)
    drawn: dict[str, Any] = {}
    if config.prompts is not None:
        for field, file in (("train", config.prompts.train), ("evaluation", config.prompts.evaluation)):
            drawn[f"{field} prompts"] = len(read_prompts(file, f"prompts.{field}"))
        refuse_shared_prompts(config.prompts)
    tables = preference_tables(config)
    drawn |= {f"{part.replace('_', '-')} pairs": len(table.pairs) for part, table in tables.items()}
    build_rewards(config.outcome)
    # From here on a generator may be downloaded.
    described = family is not None and not Path(config.model.path).exists()
    family = open_generator(config.model) if family is None else family
    if not described:
        check_generator(family)
    with torch.device("meta"):
        family.build_trunk(config.blocks)
    if config.prompts is not None:
        check_pictures(family, config.prompts)
        drawn |= check_prompts(config.prompts, family, weights=not described)
    check_images(tables, family)
    if config.preferences is not None:
        drawn |= _check_encoded(config.preferences, tables, family, weights=not described)
    return {
        "trains": "a process reward model (train-prm)",
        "generator": f"{family.pipeline_class} at {family.folder}",
        "latents": "x".join(map(str, family.latent_shape)),
        **drawn,
        **_ranks(config),
    }


def check_orm(config: OrmConfig, *, downloads: bool = True) -> dict[str, Any]:
    """Checks a recipe of ``train-orm`` without starting anything.

    Args:
        config: the recipe.
        downloads: whether a backbone that is not here is downloaded to be checked; else it is left alone.

    Returns:
        What will be trained, as text by name.

    Raises:
        ConfigError: the training cannot work; names the field, and what to do.
    """
    from euphonium.rewards.outcome_model import OutcomeModel

    _check_surroundings(config)
    counts = {}
    for part, table in zip(PARTS, open_preferences(config.preferences, config.seed), strict=True):
        labelled = int((table.label >= 0).sum())
        counts[part.replace("_", "-")] = (
            f"{len(table.files)} samples of {len(table.prompts)} prompts, {len(table.pairs)} pairs, "
            f"{len(table.ties)} ties, {labelled} labels"
        )
    backbone = config.model.path
    if downloads or Path(backbone).exists():
        OutcomeModel.from_backbone(config.model, device_map="meta")
    else:
        backbone += " (not here; train-orm downloads and checks it)"
    return {"trains": "an outcome reward model (train-orm)", "backbone": backbone, **counts, **_ranks(config)}


def preference_tables(config: PrmConfig) -> dict[str, PreferenceTable]:
    """The preferences of a recipe of ``train-prm`` by part, from its files; none if its samples are drawn.

    Raises:
        ConfigError: a file cannot be read, or a part has no pair.
    """
    if config.preferences is None:
        return {}
    tables = dict(zip(PARTS, open_preferences(config.preferences, config.seed), strict=True))
    for part, table in tables.items():
        if not len(table.pairs):
            raise ConfigError(
                f"preferences: the {part.replace('_', '-')} part has no pair: give winner and loser, or samples of one "
                "prompt with both labels"
            )
    return tables


def check_images(tables: Mapping[str, PreferenceTable], family: Generator) -> None:
    """Checks that preferences have the images that their generator takes.

    Raises:
        ConfigError: some lack one, or it cannot be read.
    """
    if family.takes_image:
        for part, table in tables.items():
            require_pictures(family, table.prompts, table.images, f"preferences: the {part} part")


def _check_encoded(
    preferences: PreferencesConfig, tables: Mapping[str, PreferenceTable], family: Generator, *, weights: bool
) -> dict[str, str]:
    """What :func:`orchestrator.commands.launch.check_prompts` does, for preferences."""
    texts = [text for table in tables.values() for text in table.prompts]
    files = [file for file in (preferences.train, preferences.held_out) if file is not None]
    found = {}
    if preferences.embeddings is not None:
        found["text encoders"] = check_embeddings(
            preferences.embeddings, family, texts, field="preferences.embeddings", files=files, weights=weights
        )
    return found | warn_of_cut_prompts(family, texts)


def _check_surroundings(config: PrmConfig | OrmConfig) -> None:
    refuse_ineffective_variables()
    refuse_unwritable(config.run_dir, "output_dir")
    refuse_unwritable(config.target, "target")
    if config.learner is not None:
        check_options(config.learner, "learner")


def _ranks(config: PrmConfig | OrmConfig) -> dict[str, str]:
    pool = config.learner
    return {"learner ranks": "this process" if pool is None else f"{pool.num_workers} x {pool.num_gpus:g} GPU"}
