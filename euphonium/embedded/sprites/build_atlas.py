"""Rasterises the vendored icons into the atlas: ``python -m euphonium.embedded.sprites.build_atlas`` (extra: assets).

With ``--source icons.json`` of the npm package ``@iconify-json/fluent-emoji-flat`` it also renews the vendored
SVG bodies of the icons in use.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from PIL import Image

from euphonium.embedded.sprites.render import ATLAS
from euphonium.embedded.sprites.world import ICONS

VENDORED = ATLAS.with_name("fluent_emoji_flat.json")
TILE = 56


def rasterise(body: str) -> Image.Image:
    """Draws one SVG body of the icon set at ``TILE`` pixels."""
    import resvg_py

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=TILE, height=TILE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def main() -> None:
    """Renews the vendored icons if asked to, then the atlas."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="icons.json of the npm package")
    source = parser.parse_args().source
    if source is not None:
        icons = json.loads(source.read_text())["icons"]
        bodies = {name: icons[name]["body"] for name in ICONS.values()}
        VENDORED.write_text(json.dumps(bodies, indent=1) + "\n")
    bodies = json.loads(VENDORED.read_text())
    sheet = Image.new("RGBA", (TILE * len(ICONS), TILE))
    for index, name in enumerate(ICONS.values()):
        sheet.paste(rasterise(bodies[name]), (index * TILE, 0))
    sheet.save(ATLAS, optimize=True)


if __name__ == "__main__":
    main()
