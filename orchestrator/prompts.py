"""Prompt files, and the order in which a run draws from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.errors import ConfigError
from core.records import GroupTask

MAX_CHARACTERS = 4000


def read_prompts(path: Path, field: str) -> list[str]:
    """Prompts of a ``.txt`` file (one a line) or ``.jsonl`` file (one object with ``prompt`` a line).

    Blank lines and, in ``.txt`` files, lines that begin with ``#`` are skipped.

    Raises:
        ConfigError: names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: cannot read {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (path.suffix != ".jsonl" and line.startswith("#")):
            continue
        prompt = _json_prompt(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.strip()
        if len(prompt) > MAX_CHARACTERS:
            raise ConfigError(f"{path}:{number}: the prompt has {len(prompt)} characters, more than {MAX_CHARACTERS}")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{field}: {path} holds no prompt")
    return prompts


def _json_prompt(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error.msg}") from error
    if not isinstance(entry, dict) or set(entry) != {"prompt"} or not isinstance(entry["prompt"], str):
        raise ConfigError(f'{where}: a line is an object with the one key "prompt" and a text')
    return str(entry["prompt"]).strip()


class PromptStream:
    """Tasks by ordinal: a fresh shuffle of the prompts every epoch, a seed of its own for every group.

    The stream has no state: a run's place in it is the number of groups that it has consumed, so a resumed run
    neither skips nor repeats a prompt.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed

    def task(self, ordinal: int, iteration: int = 0) -> GroupTask:
        """The task with this ordinal, drawn for an iteration (from 0)."""
        epoch, position = divmod(ordinal, len(self._prompts))
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._prompts))
        noise = np.random.SeedSequence([self._seed, 1, ordinal]).generate_state(1, np.uint64)[0]
        return GroupTask(
            group_id=ordinal,
            prompt=self._prompts[order[position]],
            seed=int(noise >> np.uint64(1)),
            iteration=iteration,
        )


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """At most ``count`` prompts, evenly spaced over the file."""
    chosen = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    return [prompts[i] for i in chosen]
