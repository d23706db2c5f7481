"""Findings of ``euphonium doctor``: what was looked at, where, how it is, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Result = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        check: what was looked at.
        place: node, or ``cluster``.
        result: ``WARN`` may cost speed or safety, ``FAIL`` keeps a run from working.
        detail: what was found.
        remedy: what to do; empty if nothing.
    """

    check: str
    place: str
    result: Result
    detail: str
    remedy: str = ""


def passed(check: str, place: str, detail: str) -> Finding:
    """A finding that is as it should be."""
    return Finding(check, place, "PASS", detail)


def judged(check: str, place: str, detail: str, *, good: bool, otherwise: Result, remedy: str) -> Finding:
    """A finding that is as it should be, or else has a remedy."""
    return passed(check, place, detail) if good else Finding(check, place, otherwise, detail, remedy)


def as_text(findings: Sequence[Finding]) -> str:
    """The report for people: a line a finding, and below it the remedy."""
    checks, places = (max((len(getattr(f, name)) for f in findings), default=0) for name in ("check", "place"))
    lines = []
    for finding in findings:
        lines.append(f"{finding.result}  {finding.check:<{checks}}  {finding.place:<{places}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<6}{'':<{checks}}  {'':<{places}}  -> {finding.remedy}")
    counts = {result: sum(f.result == result for f in findings) for result in ("PASS", "WARN", "FAIL")}
    lines.append(", ".join(f"{count} {result}" for result, count in counts.items()))
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The report for programs: a list of objects with the fields of :class:`Finding`."""
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)
