"""The page on which people judge pairs: one file that works without a network, clips and all."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from euphonium.files import written_aside
from orchestrator.comparison.models import Pair

PAGE = "judge.html"
TEMPLATE = Path(__file__).with_name("page.html")
TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}


def write_page(folder: Path, study: str, question: str, pairs: Sequence[Pair]) -> Path:
    """Writes ``judge.html``.

    Which model a clip is of can be told from the file's source, but not from the page as it is shown.

    Args:
        folder: where to.
        study: what the answers are to be told apart by from those of other studies.
        question: what people are asked.
        pairs: the clips.
    """
    shown = [{"prompt": pair.prompt, "a": _embedded(pair.files[0]), "b": _embedded(pair.files[1])} for pair in pairs]
    # A script's text ends at the first "</script", wherever that stands.
    data = json.dumps({"study": study, "question": question, "pairs": shown}).replace("<", "\\u003c")
    page = folder / PAGE
    with written_aside(page) as file:
        file.write_text(TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data), encoding="utf-8")
    return page


def _embedded(clip: Path) -> str:
    return f"data:{TYPES[clip.suffix]};base64,{base64.b64encode(clip.read_bytes()).decode()}"
