"""Stores of encoded prompts, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from euphonium.config import ModelConfig
from euphonium.generators.embeddings import encoder_fingerprint
from orchestrator.commands.preprocess import Encoding, finish_store, open_encoders


def store_of(folder: Path, model: ModelConfig, *shards: Sequence[str]) -> Path:
    """Encodes prompts as ``euphonium preprocess`` does, in the given shards."""
    generator, settings = open_encoders(
        ModelConfig(
            path=model.path, dtype=model.dtype, max_prompt_tokens=model.max_prompt_tokens, height=512, width=512
        )
    )
    work = Encoding(
        settings, folder, encoder_fingerprint(generator), (), tuple(tuple(shard) for shard in shards), threads=1
    )
    finish_store(work, 0, lambda line: None)
    return folder
