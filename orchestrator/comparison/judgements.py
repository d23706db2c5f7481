"""What people answered on the page of a comparison: read back, checked, and counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from euphonium.errors import ConfigError
from euphonium.text_files import parse_json, quoted, read_text
from orchestrator.comparison.models import RESULT
from orchestrator.report.bootstrap import grouped_interval

FIELD = "RESULTS"
Choice = Literal["a", "b", "tie"]
CHOICES: tuple[Choice, ...] = ("a", "b", "tie")


@dataclass(frozen=True)
class Judgement:
    """One answer.

    Attributes:
        judge: who gave it.
        pair: number of the pair.
        choice: the better model, or ``tie``.
        left: the model that was on the left.
    """

    judge: str
    pair: int
    choice: Choice
    left: str


def read_comparison(folder: Path) -> Mapping[str, Any]:
    """The ``comparison.json`` of a folder; raises ConfigError if it has none."""
    found = parse_json(read_text(folder / RESULT, "COMPARISON"), str(folder / RESULT))
    if not isinstance(found, dict) or not isinstance(found.get("pairs"), list) or "study" not in found:
        raise ConfigError(f"COMPARISON: {folder / RESULT} is no comparison; give a folder that `compare` wrote")
    return found


def read_judgements(files: Sequence[Path], comparison: Mapping[str, Any]) -> list[Judgement]:
    """Reads files that the page gave to its judges.

    Raises:
        ConfigError: a file is not of this comparison, is damaged, or two are of one judge.
    """
    found: list[Judgement] = []
    judges: dict[str, Path] = {}
    for file in files:
        held = parse_json(read_text(file, FIELD), str(file))
        if not isinstance(held, dict) or not isinstance(held.get("judgements"), list):
            raise ConfigError(f"{FIELD}: {file} holds no judgements; give what the page lets its judges download")
        if held.get("study") != comparison["study"]:
            raise ConfigError(f"{FIELD}: {file} is of another comparison; give those of this one")
        judge = str(held.get("judge"))
        if judge in judges:
            raise ConfigError(f"{FIELD}: {judges[judge]} and {file} are both by {quoted(judge)}; leave one out")
        judges[judge] = file
        found += [_judgement(entry, judge, file, len(comparison["pairs"])) for entry in held["judgements"]]
    if not found:
        raise ConfigError(f"{FIELD}: nobody has judged a pair yet")
    if len({(one.judge, one.pair) for one in found}) < len(found):
        raise ConfigError(f"{FIELD}: a judge has judged a pair twice; the files were changed, get them anew")
    return found


def _judgement(entry: object, judge: str, file: Path, pairs: int) -> Judgement:
    if isinstance(entry, dict):
        pair, choice, left = (entry.get(key) for key in ("pair", "choice", "left"))
        if type(pair) is int and 0 <= pair < pairs and choice in CHOICES and left in ("a", "b"):
            return Judgement(judge, pair, choice, left)
    raise ConfigError(f"{FIELD}: {file} holds {quoted(entry)}, which is no judgement of this comparison; get it anew")


def counted(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The tally.

    Returns:
        Numbers of judges, judgements and of each choice; ``b_better``, how often ``b`` wins (ties half), with an
        interval over the pairs; ``agreement``, the share of two judges' answers to a pair that are equal, None where no
        pair has two; ``left``, the share of wins of the left side, near 0.5 unless people have a habit.
    """
    wins = [{"a": 0.0, "tie": 0.5, "b": 1.0}[one.choice] for one in judgements]
    by_pair: dict[int, list[Choice]] = {}
    for one in judgements:
        by_pair.setdefault(one.pair, []).append(one.choice)
    twos = [x == y for choices in by_pair.values() for x, y in itertools.combinations(choices, 2)]
    decided = [one.choice == one.left for one in judgements if one.choice != "tie"]
    chosen = Counter(one.choice for one in judgements)
    return {
        "judges": len({one.judge for one in judgements}),
        "judgements": len(judgements),
        **{choice: chosen[choice] for choice in CHOICES},
        "b_better": asdict(grouped_interval(wins, [one.pair for one in judgements])),
        "agreement": sum(twos) / len(twos) if twos else None,
        "left": sum(decided) / len(decided) if decided else None,
    }
