"""Parts ``families``, ``reuse``, ``prompt_lengths`` and ``gradient_kernels`` of gpu_suite.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from gpu_suite_tools import (
    TINY,
    Record,
    Value,
    Values,
    attention,
    compiler,
    generator_of,
    release,
    setup_of,
    spread,
    timed,
)
from guided_step_networks import build_prm, family_of, made_on, random_conditioning
from guided_step_ways import GuidedStep
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from euphonium.config import load_config
from euphonium.config.run import RunConfig
from euphonium.generators.feature_cache import NEVER, FeatureCache
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.meter import Cost
from orchestrator.plan.passes import Passes

ROOT = Path(__file__).resolve().parent.parent
# One recipe of each network, by size.
RECIPES = (
    "wan-2.1/one-gpu.yaml", "ltx-video/one-gpu-lora.yaml", "stable-diffusion-3.5/one-gpu.yaml",
    "flux2/one-gpu-lora.yaml", "wan-2.2-ti2v/one-gpu-lora.yaml", "z-image/one-gpu-lora.yaml",
    "flux/one-gpu-lora.yaml", "qwen-image/one-gpu-lora.yaml", "hunyuan-video-1.5/one-gpu-lora.yaml",
)  # fmt: skip
SMALLEST = ("embedded/euphonium.yaml",)
# Tokens of a prompt, in the order in which a run meets them.
LENGTHS = (256, 200, 120, 77, 33, 160)
KERNELS = 6
GIB = 1 << 30


def families(record: Record) -> None:
    """Velocity and micro-step of each family's published size, and what its plan says of them."""
    for name in SMALLEST if record.small else RECIPES:
        config = load_config(ROOT / "recipes" / name, [])
        for step in ("velocity", "micro_step"):
            record.measure(f"{name}, {step}", lambda s=step, c=config: _against_plan(record, c, s))
            release(record.device)


def _against_plan(record: Record, config: RunConfig, step: str) -> Values:
    """One sample or row, on the device and by the plan."""
    found: Values = {}

    def meter(run: Callable[[], object], resident: Iterable[Tensor]) -> Cost:
        weights = sum(tensor.nbytes for tensor in resident) / GIB
        found.update(timed(run, record.device))
        found["weights_gib"] = weights
        return Cost(0, 0, 0)

    real = Passes(config, None, record.device, meter)
    with made_on(record.device, real.generator.dtype):
        network = real.network
    spread(network)
    getattr(real, step)(1)
    planned: Cost = getattr(Passes(config), step)(1)
    return found | {
        "planned_tflop": planned.flops / 1e12,
        "planned_activations_gib": (planned.peak_bytes + planned.workspace_bytes) / GIB,
        "planned_s": Hardware().seconds(planned, real.generator.dtype),
    }


@torch.no_grad()
def reuse(record: Record) -> None:
    """A pass, a pass with the first-block cache that computes all, and one that computes the first block alone."""
    setup, device = setup_of(record), record.device
    with family_of(setup) as family:
        transformer = generator_of(family, device)
        step = GuidedStep(family, transformer, 1, device)
        with attention("none"):
            record.measure("velocity without cache", lambda: timed(step.velocity, device))
            cache = FeatureCache(transformer)

            def one_pass(threshold: float) -> Values:
                return timed(lambda: cache.compute("samples", 1, threshold, step.velocity), device)

            record.measure("velocity with the cache, all computed", lambda: one_pass(NEVER))
            record.measure("velocity with the cache, first block alone", lambda: one_pass(float("inf")))


@torch.no_grad()
def prompt_lengths(record: Record) -> None:
    """First and second call of the compiled generator for prompts of several lengths: what is compiled anew."""
    setup, device = setup_of(record), record.device
    with family_of(setup) as family:
        transformer = generator_of(family, device)
        x = torch.randn(1, *family.latent_shape, device=device)
        at = torch.full((1,), 0.5, device=device)
        full = random_conditioning(family, 1, device)
        family.compile_blocks(transformer, compiler(device))
        for length in (8, 5) if record.small else LENGTHS:
            conditioning = {n: t if n == "pooled_projections" else t[:, :length] for n, t in full.items()}

            def once(prompt: dict[str, Tensor] = conditioning) -> float:
                began = time.perf_counter()
                family.velocity(transformer, x, at, prompt)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - began

            record.measure(f"{length} tokens", lambda c=once: {"first_s": c(), "second_s": c()})


def gradient_kernels(record: Record) -> None:
    """Which kernels the process reward's gradient spends its time in, for one state and for two."""
    setup, device = setup_of(record), record.device
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with family_of(setup) as family:
        prm = build_prm(family, TINY if record.small else setup, device)
        for batch in (1, 2):
            step = GuidedStep(family, prm.trunk, batch, device)
            step.gradient(prm)

            def kernels(step: GuidedStep = step) -> Values:
                with profile(activities=[activity]) as trace:
                    step.gradient(prm)
                    release(device)
                rows = trace.key_averages()
                attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
                rows = sorted(rows, key=lambda row: -getattr(row, attribute))
                found: dict[str, Value] = {
                    f"{row.key[:90]} x{row.count}": getattr(row, attribute) / 1e6 for row in rows[:KERNELS]
                }
                return found

            record.measure(f"kernels, batch {batch}", kernels)
            release(device)
