"""A report of runs as one HTML page that opens offline: no script, style, font or picture is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from orchestrator.report.clips import TINY, Clip, gallery
from orchestrator.report.curves import SECTIONS, charts, meaning_of
from orchestrator.report.figures import figure, number
from orchestrator.report.findings import findings
from orchestrator.report.group_detail import group_charts, group_picture
from orchestrator.report.recorded import RecordedRun, differences
from orchestrator.report.settings import masked

KINDS = {"good": "Good", "note": "Note", "warning": "Look"}


def report_page(runs: Sequence[RecordedRun], made: str, most_clip_bytes: int) -> str:
    """The page.

    Args:
        runs: what it tells of, at least one.
        made: when and by what it was made, in words.
        most_clip_bytes: of all clips together.
    """
    sections = {"Runs": _runs(runs), "What stands out": _findings(runs)}
    clips = _clips(runs, most_clip_bytes)
    for title, groups in SECTIONS.items():
        figures = "".join(figure(chart) for curves in groups for chart in charts(runs, curves))
        if figures:
            sections[title] = f"<div class=charts>{figures}</div>"
        if title == "Held-out rewards":
            sections["Clips before and after"] = clips
    if group := _group(runs, most_clip_bytes):
        sections["One group in detail"] = group
    sections |= {"Configuration": _configuration(runs), "All metrics": _metrics(runs)}
    title = "euphonium report: " + (" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs")
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{content}</section>' for name, content in sections.items()
    )
    here = files("orchestrator.report")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be loaded, so that a report says the same wherever it is opened.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><header><h1>{escape(title)}</h1><p class=soft>{escape(made)}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        "<footer><p>Curves have their values below them; a point tells its value under the pointer.</p></footer>"
        f"<script>{script}</script></body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table of HTML cells that scrolls in itself; the first cell of each row is its header."""
    top = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{escape(label)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _runs(runs: Sequence[RecordedRun]) -> str:
    head = ["run", "iterations", "held-out total, first", "best", "last", "change", "seconds an iteration", "samples"]
    rows = []
    for run in runs:
        x, y = run.series("eval/total/mean")
        seconds = run.series("time/iteration_s")[1]
        rows.append([
            escape(run.name),
            f"{run.done}" + (f" of {run.planned}" if run.planned is not None else ""),
            number(y[0]) if y else "",
            f"{number(max(y))} (iteration {x[y.index(max(y))]:.0f})" if y else "",
            number(y[-1]) if y else "",
            _change(y[-1] - y[0]) if len(y) > 1 else "",
            f"{sum(seconds) / len(seconds):.1f}" if seconds else "",
            f"{sum(run.series('rollout/samples')[1]):.0f}",
        ])  # fmt: skip
    return _table(head, rows, "Runs")


def _change(value: float, digits: int = 4) -> str:
    return f'<span class="{"up" if value > 0 else "down" if value < 0 else ""}">{value:+.{digits}f}</span>'


def _findings(runs: Sequence[RecordedRun]) -> str:
    parts = []
    for run in runs:
        items = "".join(
            f"<li class={one.kind}><b>{KINDS[one.kind]}:</b> {escape(one.text)}</li>" for one in findings(run)
        )
        head = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f"{head}<ul class=findings>{items}</ul>")
    return "".join(parts)


def _clips(runs: Sequence[RecordedRun], most_bytes: int) -> str:
    shown, left_out = gallery(runs, most_bytes)
    if not shown and not left_out:
        return "<p>No clips are saved in the folder (evaluation.clips).</p>"
    parts = ["<p>Held-out prompts, the same noise before and after.</p>"]
    if any(clip.still for one in shown for _, clip in one.clips):
        parts.append("<p><button id=motion type=button hidden>Pause the clips</button></p>")
    if left_out:
        parts.append(f"<p class=soft>{left_out} more prompts do not fit; --clips-mb raises the limit.</p>")
    parts.append("<div class=prompts>" if len(runs) == 1 else "<div>")
    for one in shown:
        first = one.clips[0][1]
        cells = "".join(_clip(caption, clip, first) for caption, clip in one.clips)
        parts.append(f"<div><h3>{escape(one.prompt)}</h3><div class=clips>{cells}</div></div>")
    return "".join(parts) + "</div>"


def _clip(caption: str, clip: Clip, first: Clip) -> str:
    look = " tiny" if max(clip.size) <= TINY else ""
    rest = f'alt="{escape(f"{caption}: {clip.prompt}")}" width={clip.size[0]} height={clip.size[1]}'
    kind = "moving" if clip.still else "picture"
    picture = f'<img class="{kind}{look}" src="{clip.moving}" {rest}>'
    if clip.still:
        picture += f'<img class="still{look}" src="{clip.still}" {rest}>'
    rows = ""
    for name, value in clip.scores.items():
        change = _change(value - first.scores[name], 2) if clip is not first and name in first.scores else ""
        cells = f"<td class=value>{value:.2f}</td><td class=value>{change}</td>"
        rows += f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>"
    wide = "" if look else " wide"
    said = f"<figcaption>{escape(caption)}</figcaption><table>{rows}</table>"
    return f'<figure class="clip{wide}">{picture}{said}</figure>'


def _group(runs: Sequence[RecordedRun], most_bytes: int) -> str:
    parts = []
    for run in runs:
        figures = "".join(figure(chart) for chart in group_charts(run))
        if not figures:
            continue
        head = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f"{head}<div class=charts>{figures}</div>")
        if picture := group_picture(run, most_bytes):
            alt = f"Decoded states of one group of {escape(run.name)}, a row a sample, a column a step, the result last"
            parts.append(
                f'<div class=picture tabindex=0 role=region aria-label="States"><img src="{picture}" alt="{alt}"></div>'
            )
    return "".join(parts)


def _configuration(runs: Sequence[RecordedRun]) -> str:
    known = [run for run in runs if run.recipe]
    if not known:
        return "<p>No resolved recipe lies beside the metrics.</p>"
    parts = []
    if len(known) > 1:
        rows = []
        for path, values in differences(known).items():
            cells = [f"<code>{escape(masked({path: value})[path])}</code>" for value in values]
            rows.append([f"<code>{escape(path)}</code>", *cells])
        names = [escape(run.name) for run in known]
        parts.append("<h3>Settings that differ</h3>")
        parts.append(_table(["setting", *names], rows, "Settings that differ") if rows else "<p>None differ.</p>")
    for run in known:
        text = "\n".join(f"{path}: {value}" for path, value in masked(run.settings).items())
        label = f"All settings of {escape(run.name)}"
        parts.append(
            f"<details><summary>{label}</summary><div class=scroll tabindex=0 role=region "
            f'aria-label="{label}"><pre>{escape(text)}</pre></div></details>'
        )
    return "".join(parts)


def _metrics(runs: Sequence[RecordedRun]) -> str:
    names = [f"{escape(run.name)}: " if len(runs) > 1 else "" for run in runs]
    columns = ("first", "last", "lowest", "highest")
    head = ["metric", *(f"{name}{what}" for name in names for what in columns), "meaning"]
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    rows = []
    for key in keys:
        cells = [f"<code>{escape(key)}</code>"]
        for run in runs:
            y = run.series(key)[1]
            cells += [number(value) for value in (y[0], y[-1], min(y), max(y))] if y else [""] * 4
        rows.append([*cells, escape(meaning_of(key))])
    return f"<details><summary>{len(rows)} metrics</summary>{_table(head, rows, 'All metrics')}</details>"
