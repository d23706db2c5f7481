"""Line charts as inline SVG for HTML pages, each with its values as a table for those who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 400, 240
# Left, top, right, bottom of the plotted area.
LEFT, TOP, RIGHT, BOTTOM = 52, 10, 390, 208
COLOURS = 6
DASHES = ("", "6 3", "2 3", "8 3 2 3")
MOST_POINTS, MOST_MARKS, MOST_ROWS = 400, 60, 40


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: in the legend.
        x: positions, ascending.
        y: finite values.
        error: half the height of the band around each value; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A chart of curves over iterations.

    Attributes:
        title: above it.
        series: the curves, each with at least one point.
        meaning: how to read it, below the title.
        log: whether the vertical axis is logarithmic; what is not positive lies on its lower end.
        guides: dashed lines at some values, and what they mean.
        x_label: below the axis.
    """

    title: str
    series: Sequence[Series]
    meaning: str = ""
    log: bool = False
    guides: Mapping[float, str] = field(default_factory=dict)
    x_label: str = "iteration"


def figure(chart: Chart) -> str:
    """A chart as an HTML ``figure``: title, legend, SVG, and a table of at most ``MOST_ROWS`` rows."""
    meaning = f"<p class=meaning>{escape(chart.meaning)}</p>" if chart.meaning else ""
    return (
        f"<figure class=chart><figcaption>{escape(chart.title)}</figcaption>{meaning}{_legend(chart)}"
        f"{_svg(chart)}{_values(chart)}</figure>"
    )


def number(value: float) -> str:
    """A number for people to read.

    Example:
        >>> [number(x) for x in (0.123456, 12345.0, 2.5e-7, 3.0)]
        ['0.1235', '12345', '2.5e-07', '3']
    """
    if abs(value) >= 1000:
        return f"{value:.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}"


def ticks(lo: float, hi: float, most: int = 6) -> list[float]:
    """Round numbers that cover a range, ascending.

    Example:
        >>> ticks(0.13, 0.58)
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    """
    if hi <= lo:
        lo, hi = (lo - abs(lo) * 0.1, hi + abs(hi) * 0.1) if lo else (0.0, 1.0)
    rough = (hi - lo) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


class _Scale:
    """Places values on the axes."""

    def __init__(self, chart: Chart) -> None:
        xs = [x for one in chart.series for x in one.x]
        ys = [*(y for one in chart.series for y in one.y), *chart.guides]
        for one in chart.series:
            ys += [y + sign * e for y, e in zip(one.y, one.error, strict=False) for sign in (-1, 1)]
        self.log = chart.log
        if self.log:
            above = [y for y in ys if y > 0] or [1e-9, 1.0]
            low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
            high = max(high, low + 1)
            stride = -(-(high - low) // 5)
            self.y_ticks = [10.0**power for power in range(low, high + 1, stride)]
            self.y0, self.y1 = float(low), float(max(high, math.log10(self.y_ticks[-1])))
        else:
            self.y_ticks = ticks(min(ys), max(ys))
            self.y0, self.y1 = self.y_ticks[0], self.y_ticks[-1]
        self.x0, self.x1 = min(xs), max(max(xs), min(xs) + 1)
        self.x_ticks = [tick for tick in ticks(self.x0, self.x1) if self.x0 <= tick <= self.x1 and tick == int(tick)]

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.x0) / (self.x1 - self.x0) * (RIGHT - LEFT), 1)

    def y(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.y0
        share = (value - self.y0) / (self.y1 - self.y0)
        return round(BOTTOM - min(1.0, max(0.0, share)) * (BOTTOM - TOP), 1)


def _style(place: int) -> str:
    dash = DASHES[place // COLOURS % len(DASHES)]
    return f'class="c{place % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _svg(chart: Chart) -> str:
    scale = _Scale(chart)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_summary(chart))}">']
    for tick in scale.y_ticks:
        y = scale.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/><text x="{LEFT - 6}" y="{y + 4}" class="left">'
                     f"{number(tick)}</text>")  # fmt: skip
    for tick in scale.x_ticks:
        parts.append(f'<text x="{scale.x(tick)}" y="{BOTTOM + 15}" class="below">{number(tick)}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 3}" class="below">{escape(chart.x_label)}</text>')
    for value, meaning in chart.guides.items():
        y = scale.y(value)
        parts.append(f'<path class="guide" d="M{LEFT} {y}H{RIGHT}"/>'
                     f'<text x="{RIGHT}" y="{y - 3}" class="right">{escape(meaning)}</text>')  # fmt: skip
    for place, one in enumerate(chart.series):
        parts.append(_curve(one, place, scale))
    return "".join(parts) + "</svg>"


def _curve(one: Series, place: int, scale: _Scale) -> str:
    chosen = thinned(len(one.x), MOST_POINTS)
    points = [(scale.x(one.x[i]), scale.y(one.y[i])) for i in chosen]
    drawn = ""
    if one.error:
        upper = [f"{scale.x(one.x[i])} {scale.y(one.y[i] + one.error[i])}" for i in chosen]
        lower = [f"{scale.x(one.x[i])} {scale.y(one.y[i] - one.error[i])}" for i in reversed(chosen)]
        drawn += f'<path class="band c{place % COLOURS}" d="M{"L".join(upper + lower)}Z"/>'
    drawn += f'<path {_style(place)} d="M{"L".join(f"{x} {y}" for x, y in points)}"/>'
    if len(points) <= MOST_MARKS:
        for i, (x, y) in zip(chosen, points, strict=True):
            tip = f"{one.name}: {number(one.y[i])} at {number(one.x[i])}"
            drawn += (
                f'<circle class="c{place % COLOURS}" cx="{x}" cy="{y}" r="2.5"><title>{escape(tip)}</title></circle>'
            )
    return drawn


def thinned(count: int, most: int) -> list[int]:
    """At most that many places of a sequence, evenly spaced, with the first and the last one.

    Example:
        >>> thinned(9, 3)
        [0, 4, 8]
    """
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _summary(chart: Chart) -> str:
    parts = [
        f"{one.name} from {number(one.y[0])} at {number(one.x[0])} to {number(one.y[-1])} at {number(one.x[-1])}"
        for one in chart.series
    ]
    return f"{chart.title} over {chart.x_label}: " + "; ".join(parts)


def _legend(chart: Chart) -> str:
    if len(chart.series) == 1:
        return ""
    items = [
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path {_style(place)} d="M0 4H22"/></svg>'
        f"{escape(one.name)}</li>"
        for place, one in enumerate(chart.series)
    ]
    return f"<ul class=legend>{''.join(items)}</ul>"


def _values(chart: Chart) -> str:
    xs = sorted({x for one in chart.series for x in one.x})
    shown = [xs[i] for i in thinned(len(xs), MOST_ROWS)]
    columns = [dict(zip(one.x, one.y, strict=True)) for one in chart.series]
    head = "".join(f"<th scope=col>{escape(one.name)}</th>" for one in chart.series)
    rows = [
        f"<tr><th scope=row>{number(x)}</th>"
        + "".join(f"<td>{number(column[x]) if x in column else ''}</td>" for column in columns)
        + "</tr>"
        for x in shown
    ]
    some = f", {len(shown)} of {len(xs)} iterations" if len(shown) < len(xs) else ""
    return (
        f"<details><summary>Values<span class=hidden> of {escape(chart.title)}</span>{some}</summary>"
        f'<div class=scroll tabindex=0 role=region aria-label="Values of {escape(chart.title)}"><table>'
        f"<thead><tr><th scope=col>{escape(chart.x_label)}</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
