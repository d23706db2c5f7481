"""Arguments of the command line: how their texts are read."""

from __future__ import annotations

from pathlib import Path

from euphonium.errors import ConfigError
from euphonium.text_files import has_surrogates, quoted


def file_argument(text: str) -> Path:
    """A path; ``~`` stays for us where the shell leaves it, as in ``--output=~/clips``."""
    from euphonium.config.base import user_path

    return user_path(text)


def prompt_argument(text: str) -> str:
    """A prompt; raises ConfigError for one that is empty."""
    if has_surrogates(text) or not text.strip():
        raise ConfigError(f"--prompt {quoted(text)}: a prompt is a text in UTF-8, and not empty; give one")
    return text


def negative_prompt_argument(text: str) -> str:
    """A negative prompt, which may be empty; raises ConfigError for bytes that are no text."""
    if has_surrogates(text):
        raise ConfigError(f"--negative-prompt {quoted(text)}: give a text in UTF-8")
    return text
