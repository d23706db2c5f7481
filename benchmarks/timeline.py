"""Who works when: a picture of some iterations of a real run, one row an actor.

    python benchmarks/timeline.py recipes/embedded/euphonium-sage.yaml -o docs/timeline.png rollout.max_staleness=1

Runs a few iterations of a recipe in a cluster of its own and draws what Ray's own tracing recorded: the calls of
rollout actors, reward servers and weight store. The learner group pulls its work, so its updates are the time from the
lease of a plan to the first bucket of new weights, and its publications from there to the acknowledgement. The gap
between two bars of a rollout actor is the time in which it had nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from euphonium.config import RunConfig, load_config
from orchestrator.commands.launch import plan_start, prepare_run_dir
from orchestrator.commands.paths import absolute_paths

COLOURS = {
    "drawing": "#0b63c5", "process reward": "#1f8a4c", "scoring": "#8d3fb0", "update": "#d1570b",
    "publication": "#c9a400", "fetching weights": "#707070",
}  # fmt: skip
CALLS = {
    "RolloutActor.generate": "drawing", "PrmActor.reward_and_gradient": "process reward", "OrmActor.score": "scoring",
    "WeightStore.fetch": "fetching weights",
}  # fmt: skip
LEFT, ROW, WIDTH = 110, 26, 1100

# Start and end in microseconds, and what is done.
Bar = tuple[float, float, str]


def trace(config: RunConfig) -> list[dict[str, Any]]:
    """Runs a recipe, and returns Ray's events in the format of Chrome's tracing."""
    import ray

    from orchestrator.lifecycle import execute
    from orchestrator.run import Run

    prepare_run_dir(config, plan_start(config))
    ray.init(address="local", namespace="timeline", log_to_driver=False, logging_level="ERROR")
    try:
        asyncio.run(execute(Run(config, "timeline", None)))
        # Workers send their events every second.
        time.sleep(3)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            ray.timeline(file.name)
            events: list[dict[str, Any]] = json.loads(Path(file.name).read_text())
    finally:
        ray.shutdown()
    return events


def rows_of(events: list[dict[str, Any]]) -> dict[str, list[Bar]]:
    """Bars by actor; actors of a role are numbered in the order of their first call."""
    calls = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "dur" in event:
            name = str(event["cat"]).removeprefix("task::")
            calls[name].append((event["ts"], event["ts"] + event["dur"], str(event["tid"])))
    rows: dict[str, list[Bar]] = defaultdict(list)
    for call, what in CALLS.items():
        workers: dict[str, str] = {}
        role = call.removesuffix("." + call.rpartition(".")[2]).removesuffix("Actor").lower()
        for begin, end, worker in sorted(calls[call]):
            row = workers.setdefault(worker, f"{role}-{len(workers)}")
            rows[row if role != "weightstore" else "weight store"].append((begin, end, what))
    leases = sorted(end for _, end, _ in calls["LearnerMailbox.lease"])
    buckets = sorted(begin for begin, _, _ in calls["WeightStore.put_bucket"])
    receipts = sorted(begin for begin, _, _ in calls["LearnerMailbox.acknowledge"])
    for begin, following in itertools.pairwise([*leases, float("inf")]):
        first = next((t for t in buckets if begin < t < following), None)
        done = next((t for t in receipts if t > begin), None)
        if first is not None and done is not None and first < done:
            rows["learner"] += [(begin, first, "update"), (first, done, "publication")]
    return rows


def draw(rows: dict[str, list[Bar]], title: str) -> Image.Image:
    """The picture, from the second update to the last."""
    updates = [bar for bar in rows["learner"] if bar[2] == "update"]
    begin, end = updates[1][0], updates[-1][1]
    order = sorted(
        rows,
        key=lambda name: (["rollout", "prm", "orm", "learner", "weight"].index(name.split("-")[0].split()[0]), name),
    )
    height = 80 + ROW * len(order) + 30
    image = Image.new("RGB", (LEFT + WIDTH + 30, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    pen.text((LEFT, 10), title, fill="black", font=ImageFont.load_default(15))

    def place(t: float) -> float:
        return LEFT + (min(max(t, begin), end) - begin) / (end - begin) * WIDTH

    for number, name in enumerate(order):
        top = 40 + ROW * number
        pen.text((LEFT - 8, top + ROW / 2), name, fill="black", font=font, anchor="rm")
        pen.line([(LEFT, top + ROW - 1), (LEFT + WIDTH, top + ROW - 1)], fill="#e4e4e4")
        for start, stop, what in rows[name]:
            if stop > begin and start < end:
                pen.rectangle(
                    [place(start), top + 3, max(place(stop), place(start) + 1), top + ROW - 4], fill=COLOURS[what]
                )
    bottom = 40 + ROW * len(order)
    seconds = (end - begin) / 1e6
    for tick in range(0, int(seconds) + 1, max(1, int(seconds / 10))):
        pen.text((place(begin + tick * 1e6), bottom + 6), f"{tick} s", fill="black", font=font, anchor="mt")
    x = LEFT
    for what, colour in COLOURS.items():
        pen.rectangle([x, bottom + 34, x + 14, bottom + 46], fill=colour)
        pen.text((x + 20, bottom + 40), what, fill="black", font=font, anchor="lm")
        x += 150
    return image


def overlap(rows: dict[str, list[Bar]]) -> float:
    """Share of the time of updates and publications in which at least one rollout actor draws."""
    drawing = sorted((b, e) for name, bars in rows.items() if name.startswith("rollout") for b, e, _ in bars)
    busy = covered = 0.0
    for begin, end, _ in rows["learner"]:
        busy += end - begin
        at = begin
        for start, stop in drawing:
            start, stop = max(start, at), min(stop, end)
            if stop > start:
                covered += stop - start
                at = stop
    return covered / busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=6)
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        own = [f"iterations={options.iterations}", f"output_dir={folder}", "evaluation.every=1000000",
               "evaluation.clips=0", "metrics.prometheus_port=null"]  # fmt: skip
        config = absolute_paths(load_config(options.recipe, [*options.overrides, *own]))
        rows = rows_of(trace(config))
    title = f"{config.name}, max_staleness {config.rollout.max_staleness}"
    draw(rows, title).save(options.output)
    print(json.dumps({"rollout_works_during_update_and_publication": round(overlap(rows), 3)}))


if __name__ == "__main__":
    main()
