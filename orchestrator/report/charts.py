"""Line charts, with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (760, 440)
# Left, top, right, bottom of the plotted area.
AREA = (64, 40, 736, 336)
COLOURS = ("#0b63c5", "#d1570b", "#6b6b6b", "#1f8a4c", "#8d3fb0")
TICKS = 10


def line_chart(
    x: Sequence[float], series: Mapping[str, Sequence[float]], *, title: str, x_label: str, guides: Mapping[float, str]
) -> Image.Image:
    """A chart of shares (0 to 1) over another share.

    Args:
        x: positions in [0, 1].
        series: values in [0, 1] by name, one a position.
        title: above the chart.
        x_label: below the axis.
        guides: dashed lines at some values, and what they mean.
    """
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    left, top, right, bottom = AREA

    def place(px: float, py: float) -> tuple[float, float]:
        return left + px * (right - left), bottom - py * (bottom - top)

    draw.text((left, 12), title, fill="black", font=ImageFont.load_default(15))
    for tick in range(TICKS + 1):
        share = tick / TICKS
        x0, y0 = place(share, share)
        draw.line([(left, y0), (right, y0)], fill="#e4e4e4")
        draw.text((left - 8, y0), f"{share:.0%}", fill="black", font=font, anchor="rm")
        draw.line([(x0, bottom), (x0, bottom + 4)], fill="black")
        draw.text((x0, bottom + 8), f"{share:.1f}", fill="black", font=font, anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    draw.text(((left + right) / 2, bottom + 26), x_label, fill="black", font=font, anchor="mt")
    for share, meaning in guides.items():
        _, y0 = place(0, share)
        for dash in range(left, right, 10):
            draw.line([(dash, y0), (dash + 5, y0)], fill="#909090")
        draw.text((right - 4, y0 - 3), meaning, fill="#707070", font=font, anchor="rb")
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(px, py) for px, py in zip(x, values, strict=True)]
        draw.line(points, fill=colour, width=2)
        for px, py in points:
            draw.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        row = bottom + 48 + 18 * number
        draw.line([(left, row), (left + 24, row)], fill=colour, width=2)
        draw.text((left + 32, row), name, fill="black", font=font, anchor="lm")
    return image
