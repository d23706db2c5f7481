"""What one guided sampling step costs: time, memory and arithmetic, beside Table 2 of the Euphonium paper.

    python benchmarks/guided_step.py                      # full size on a GPU, tiny on a machine without one
    python benchmarks/guided_step.py --tiny               # tiny everywhere: checks that everything runs
    python benchmarks/guided_step.py --json result.json

At full size it builds the HunyuanVideo transformer (20 dual-stream and 40 single-stream blocks, 12.8 B parameters) and
a process reward model of its first 8 blocks (3.1 B), both with random weights made on the GPU in bfloat16: time and
memory do not depend on what the weights say. The state is that of 480x480 clips of 33 frames, latents 16x9x60x60, with
256 text tokens. One GPU of 80 GB does (about 40 GiB by estimate); a second one in the same machine is used if there is
one. Nothing is downloaded, and Ray is not needed.

Rows:
    unguided      one velocity evaluation and the Gaussian step: the baseline.
    sequential    the gradient of the process reward, then the velocity, on one stream: what a single process does.
    recomputed    the same, recomputing the reward model's activations in its backward pass: more time, less memory.
    own stream    the gradient on a CUDA stream of its own, beside the velocity.
    second GPU    the gradient on another GPU, beside the velocity: what a PRM server does, without the network.

Every row's next state is compared with the sequential one's, where a race between streams would show. Times are
between CUDA events on the step's stream, which waits for all others; peaks are of allocated memory, weights included.
Without a GPU times are of the wall clock, there are no peaks, and the last two rows are left out.

Floating-point operations are counted on the meta device, which computes nothing, so they are reported at full size on
every machine: 165 TFLOP a velocity and 52 a gradient. Guidance in the same process therefore costs 31 % more
arithmetic in a guided step, whatever the stream, and the paper's +2.4 % cannot be that of a forward and a backward
pass of 8 such blocks on the same state; on another GPU it costs the generator nothing but two copies of the state.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from guided_step_measures import FlopCount, Row, Step, Stopwatch
from guided_step_networks import FULL, TINY, Setup, build_generator, build_prm, family_of
from guided_step_ways import GuidedStep
from torch import Tensor

# Euphonium, Table 2: one H800, HunyuanVideo, 480x480, 32 frames.
PAPER = {
    "unguided": {"median_ms": 1005.6, "peak_gb": 32.9},
    "sequential": {"median_ms": 1030.1, "peak_gb": 35.7},
}


@dataclass
class Result:
    """All rows and what they were measured on."""

    device: str
    torch: str
    tiny: bool
    batch: int
    latent_shape: tuple[int, ...]
    text_tokens: int
    parameters: dict[str, int]
    tflop: dict[str, dict[str, float]]
    paper: dict[str, dict[str, float]]
    rows: list[Row] = field(default_factory=list)


def count_tflop(setup: Setup, batch: int) -> dict[str, float]:
    """Tera floating-point operations of a velocity and of a reward gradient, counted without computing them."""
    meta = torch.device("meta")
    with family_of(setup) as family:
        step = GuidedStep(family, build_generator(family, meta), batch, meta)
        prm = build_prm(family, setup, meta)
        counts = {}
        with torch.no_grad():
            parts: dict[str, Callable[[], Tensor]] = {
                "velocity": step.velocity, "gradient": lambda: step.gradient(prm),
            }  # fmt: skip
            for name, part in parts.items():
                counter = FlopCount()
                with counter:
                    part()
                counts[name] = counter.total / 1e12
    return counts | {"overhead": counts["gradient"] / counts["velocity"]}


def run(setup: Setup, *, tiny: bool, batch: int, warmup: int, repeats: int) -> Result:
    """Measures all rows that this machine allows."""
    torch.manual_seed(0)
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    with family_of(setup) as family:
        transformer = build_generator(family, device)
        step = GuidedStep(family, transformer, batch, device)
        result = Result(
            device=torch.cuda.get_device_name(device) if gpus else "cpu", torch=torch.__version__, tiny=tiny,
            batch=batch, latent_shape=family.latent_shape, text_tokens=family.config.max_prompt_tokens,
            parameters={"generator": sum(p.numel() for p in transformer.parameters())},
            tflop={"this run": count_tflop(setup, batch), "full size": count_tflop(FULL, 1)}, paper=PAPER,
        )  # fmt: skip
        watch = Stopwatch([device], warmup, repeats)
        # The baseline must not hold the reward model's weights: it is built only now.
        unguided, _ = watch.measure("unguided", step.unguided, None, None)
        prm = build_prm(family, setup, device)
        result.parameters["process reward model"] = sum(p.numel() for p in prm.parameters())
        sequential, expected = watch.measure("sequential", lambda: step.sequential(prm), unguided, None)
        result.rows += [unguided, sequential]

        def compare(name: str, way: Step, *others: torch.device) -> None:
            stopwatch = Stopwatch([device, *others], warmup, repeats)
            result.rows.append(stopwatch.measure(name, way, unguided, expected)[0])

        if gpus:
            stream = torch.cuda.Stream(device)
            compare("own stream", lambda: step.own_stream(prm, stream))
        prm.trunk.enable_gradient_checkpointing()  # type: ignore[operator]
        compare("recomputed", lambda: step.sequential(prm))
        prm.trunk.disable_gradient_checkpointing()  # type: ignore[operator]
        if gpus > 1:
            second = torch.device("cuda", 1)
            prm.to(second)
            prompt = {name: tensor.to(second) for name, tensor in step.conditioning.items()}
            compare("second GPU", lambda: step.second_device(prm, second, prompt), second)
    return result


def table_of(result: Result) -> str:
    """The rows as text, the paper's beside them."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{result.device}, torch {result.torch}, latents {'x'.join(map(str, result.latent_shape))}, "
        f"{result.text_tokens} text tokens, batch {result.batch}",
        ", ".join(f"{name} {count / 1e9:.3g} B parameters" for name, count in result.parameters.items()),
        "",
        f"{'step':<12}{'ms':>10}{'overhead':>10}{'peak GiB':>10}{'on 2nd':>8}{'differs':>10}   "
        + ("tiny networks: not the paper's" if result.tiny else "paper (H800)"),
    ]
    for row in result.rows:
        paper = None if result.tiny else result.paper.get(row.name)
        beside = f"{paper['median_ms']:.1f} ms, {paper['peak_gb']:.1f} GB" if paper else ""
        lines.append(
            f"{row.name:<12}{row.median_ms:>10.1f}{row.overhead:>+10.1%}{cell(row.peak_gib, '.1f'):>10}"
            f"{cell(row.peak_second_gib, '.1f'):>8}{cell(row.difference, '.1e'):>10}   {beside}"
        )
    lines.append("")
    for name, count in result.tflop.items():
        lines.append(
            f"{name}: velocity {count['velocity']:.3g} TFLOP, gradient {count['gradient']:.3g} TFLOP "
            f"({count['overhead']:+.1%})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a guided sampling step and its parts.")
    parser.add_argument("--tiny", action="store_true", help="tiny networks; the default without a GPU")
    parser.add_argument("--batch", type=int, default=1, help="samples in a step")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock runs")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each row")
    parser.add_argument("--json", type=Path, help="file for the result as JSON; stdout when left out")
    arguments = parser.parse_args()
    for name in ("batch", "warmup", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    tiny = arguments.tiny or not torch.cuda.is_available()
    result = run(
        TINY if tiny else FULL, tiny=tiny, batch=arguments.batch, warmup=arguments.warmup, repeats=arguments.repeats
    )
    text = json.dumps(asdict(result), indent=2)
    if arguments.json is None:
        print(text)
    else:
        arguments.json.write_text(text + "\n")
    print(table_of(result), file=sys.stderr if arguments.json is None else sys.stdout)


if __name__ == "__main__":
    main()
