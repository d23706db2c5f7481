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
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from euphonium.config import ModelConfig
from euphonium.dynamics import Guidance, StepTable, shifted_sigmas
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.registry import open_generator
from euphonium.rewards.process import ProcessRewardModel

# Euphonium, Table 2: one H800, HunyuanVideo, 480x480, 32 frames.
PAPER = {
    "unguided": {"median_ms": 1005.6, "peak_gb": 32.9},
    "sequential": {"median_ms": 1030.1, "peak_gb": 35.7},
}
GIB = 2**30
GUIDED_STEP = 8


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of the networks and of the state.

    Attributes:
        transformer: configuration of ``HunyuanVideoTransformer3DModel``; what is left out has the class's default,
            which is the published model's.
        model: shape of a sample, and type of the weights.
        head: options of the process reward model's head.
        prm_blocks: blocks of its trunk.
    """

    transformer: dict[str, Any]
    model: dict[str, Any]
    head: dict[str, Any]
    prm_blocks: int


FULL = Setup(
    transformer={},
    model={
        "dtype": "bfloat16", "frames": 33, "height": 480, "width": 480, "max_prompt_tokens": 256,
        "embedded_guidance": 6.0,
    },
    head={},
    prm_blocks=8,
)  # fmt: skip
TINY = Setup(
    transformer={
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 4,
        "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16, "rope_axes_dim": [4, 6, 6],
    },
    model={
        "dtype": "bfloat16", "frames": 9, "height": 64, "width": 64, "max_prompt_tokens": 8, "embedded_guidance": 6.0,
    },
    head={"hidden": 16},
    prm_blocks=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of taking a step.

    Attributes:
        name: of the way.
        median_ms: median time of a step.
        fastest_ms: the fastest.
        slowest_ms: the slowest.
        peak_gib: largest allocated memory on the generator's GPU in GiB; None without a GPU.
        peak_second_gib: the same of the second GPU, where there is one in use.
        overhead: ``median_ms`` over that of the unguided step, less one.
        gradient_norm: length of the reward gradient; None without guidance.
        gradient_finite: whether all of it is finite; None without guidance.
        difference: largest deviation of the next state from the sequential row's; None where that is undefined.
    """

    name: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    peak_gib: float | None
    peak_second_gib: float | None
    overhead: float
    gradient_norm: float | None = None
    gradient_finite: bool | None = None
    difference: float | None = None


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


@contextmanager
def family_of(setup: Setup) -> Iterator[Generator]:
    """The generator family of a setup: configuration files without weights, in a folder that goes away."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel(**setup.transformer)
    files = {
        "model_index.json": json.dumps({"_class_name": "HunyuanVideoPipeline"}),
        # Not dict(transformer.config): that lists the values that were left out, and from_config would ignore ours.
        "transformer/config.json": transformer.to_json_string(),
        "vae/config.json": json.dumps(
            {
                "latent_channels": transformer.config.in_channels,
                "spatial_compression_ratio": 8,
                "temporal_compression_ratio": 4,
            }
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        yield open_generator(ModelConfig(path=folder, **setup.model))


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Networks built inside get their weights on this device in this type at once: 12.8 B need no detour."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_generator(family: Generator, device: torch.device) -> nn.Module:
    """A transformer with random weights."""
    with made_on(device, family.dtype):
        return family.build_transformer().eval().requires_grad_(False)


def build_prm(family: Generator, setup: Setup, device: torch.device) -> ProcessRewardModel:
    """A process reward model with random weights; its head is in float32 whatever the trunk is in."""
    with made_on(device, family.dtype):
        model = ProcessRewardModel(family, setup.prm_blocks, setup.head)
    model.head.float()
    return model.eval().requires_grad_(False)


def random_conditioning(family: Generator, batch: int, device: torch.device) -> Conditioning:
    """Text embeddings of full length."""
    config = family.transformer_config()
    tokens = family.config.max_prompt_tokens

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=family.dtype)

    return {
        "encoder_hidden_states": draw(tokens, int(config["text_embed_dim"])),
        "encoder_attention_mask": torch.ones(batch, tokens, device=device, dtype=family.dtype),
        "pooled_projections": draw(int(config["pooled_projection_dim"])),
    }


class GuidedStep:
    """One step of the sampler on a fixed state, in all the ways that are compared.

    Each method returns the next state and the reward gradient, both on the generator's device.
    """

    def __init__(self, family: Generator, transformer: nn.Module, batch: int, device: torch.device) -> None:
        self.family = family
        self.transformer = transformer
        self.device = device
        # The paper's preset: eps = 0.3125, so eta = sqrt(2 eps); lambda = 0.1 in steps 8 to 16 of 16.
        self.table = StepTable.build(
            "dance", shifted_sigmas(16, 5.0), eta=0.625**0.5, guidance=Guidance(scale=0.1, window=(GUIDED_STEP, 16))
        )
        self.conditioning = random_conditioning(family, batch, device)
        self.x = torch.randn(batch, *family.latent_shape, device=device)
        self.noise = torch.randn_like(self.x)

    def _sigma(self, device: torch.device) -> Tensor:
        return torch.full((len(self.x),), float(self.table.sigmas[GUIDED_STEP]), device=device)

    def velocity(self) -> Tensor:
        """The generator's output."""
        return self.family.velocity(self.transformer, self.x, self._sigma(self.device), self.conditioning)

    def gradient(self, prm: ProcessRewardModel) -> Tensor:
        """The reward gradient at the state."""
        return prm.reward_and_gradient(self.x, self._sigma(self.device), self.conditioning)[1]

    def _next(self, v: Tensor, gradient: Tensor | None) -> Tensor:
        return self.table.sample(GUIDED_STEP, self.table.mean(GUIDED_STEP, self.x, v, gradient), self.noise)

    def unguided(self) -> tuple[Tensor, None]:
        """Velocity alone."""
        return self._next(self.velocity(), None), None

    def sequential(self, prm: ProcessRewardModel) -> tuple[Tensor, Tensor]:
        """Gradient, then velocity."""
        gradient = self.gradient(prm)
        return self._next(self.velocity(), gradient), gradient

    def own_stream(self, prm: ProcessRewardModel, stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        """Gradient on another stream of the same GPU."""
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Backward kernels run on the stream of their forward ones.
            gradient = self.gradient(prm)
        # The allocator may hand out a tensor's memory again once its own stream is done with it; these tensors are
        # read on a stream that did not make them.
        for shared in (self.x, *self.conditioning.values()):
            shared.record_stream(stream)
        v = self.velocity()
        current.wait_stream(stream)
        gradient.record_stream(current)
        return self._next(v, gradient), gradient

    def second_device(
        self, prm: ProcessRewardModel, second: torch.device, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """Gradient on another GPU, which holds the model and the prompt; state and gradient travel.

        Copies between GPUs are ordered with the current streams of both, so no further synchronisation is needed.
        """
        state = self.x.to(second, non_blocking=True)
        _, gradient = prm.reward_and_gradient(state, self._sigma(second), conditioning)
        v = self.velocity()
        returned = gradient.to(self.device, non_blocking=True)
        return self._next(v, returned), returned


Step = Callable[[], tuple[Tensor, Tensor | None]]


class Stopwatch:
    """Times steps and watches memory on the devices that take part."""

    def __init__(self, devices: list[torch.device], warmup: int, repeats: int) -> None:
        self.devices = devices
        self.warmup = warmup
        self.repeats = repeats

    def _synchronize(self) -> None:
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _once(self, step: Step) -> float:
        """Milliseconds of one step; nothing else is under way."""
        if self.devices[0].type != "cuda":
            began = time.perf_counter()
            step()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.devices[0])
        start.record(stream)
        step()
        end.record(stream)
        self._synchronize()
        return float(start.elapsed_time(end))

    @torch.no_grad()
    def measure(self, name: str, step: Step, unguided: Row | None, sequential: Tensor | None) -> tuple[Row, Tensor]:
        """The row of a way of stepping, and its next state on the CPU."""
        gc.collect()
        if self.devices[0].type == "cuda":
            torch.cuda.empty_cache()
        for _ in range(self.warmup):
            step()
        self._synchronize()
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        times = [self._once(step) for _ in range(self.repeats)]
        peaks: list[float | None] = [
            torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None for device in self.devices
        ]
        following, gradient = step()
        after = following.cpu()
        median = statistics.median(times)
        row = Row(
            name=name, median_ms=median, fastest_ms=min(times), slowest_ms=max(times),
            peak_gib=peaks[0], peak_second_gib=peaks[1] if len(peaks) > 1 else None,
            overhead=median / unguided.median_ms - 1 if unguided else 0.0,
            gradient_norm=None if gradient is None else float(gradient.norm()),
            gradient_finite=None if gradient is None else bool(torch.isfinite(gradient).all()),
            difference=None if sequential is None else float((after - sequential).abs().max()),
        )  # fmt: skip
        return row, after


class FlopCount(TorchDispatchMode):
    """Adds up the operations of everything that runs inside, backward passes too.

    torch's ``FlopCounterMode`` tracks modules with hooks that ``torch.autograd.grad`` refuses.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


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
