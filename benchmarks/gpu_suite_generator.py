"""Parts ``velocity`` and ``compiled`` of gpu_suite.py: the generator's pass and a guided step at full size."""

from __future__ import annotations

import time

import torch
from gpu_suite_tools import (
    Mask,
    Record,
    Values,
    attention,
    backends,
    compiler,
    generator_of,
    matrix_product,
    release,
    setup_of,
    timed,
)
from guided_step_networks import build_prm, family_of
from guided_step_ways import GuidedStep
from torch import nn

from euphonium.generators.generator import Generator
from euphonium.rewards.process import ProcessRewardModel


@torch.no_grad()
def velocity(record: Record) -> None:
    """Velocities with and without attention mask, by backend and batch; then what guidance adds to a step."""
    setup, device = setup_of(record), record.device
    record.measure("matrix product, bfloat16", lambda: matrix_product(device, small=record.small))
    with family_of(setup) as family:
        began = time.perf_counter()
        transformer = generator_of(family, device)
        record.measure("build the generator", lambda: {"seconds": time.perf_counter() - began})
        _velocities(record, family, transformer)
        prm = build_prm(family, setup, device)
        step = GuidedStep(family, transformer, 1, device)
        for mask in ("none", "as built"):
            with attention(mask):
                _guidance(record, step, prm, mask)
        batch = GuidedStep(family, transformer, 2, device)
        with attention("none"):
            record.measure("gradient, batch 2, mask none", lambda: timed(lambda: batch.gradient(prm), device))


def _velocities(record: Record, family: Generator, transformer: nn.Module) -> None:
    device = record.device
    masks: dict[int, tuple[Mask, ...]] = {1: ("none", "as built", "all true"), 4: ("none", "all true")}
    for batch in masks:
        step = GuidedStep(family, transformer, batch, device)
        for mask in masks[batch]:
            with attention(mask):
                record.measure(f"velocity, batch {batch}, mask {mask}", lambda s=step: timed(s.velocity, device))
        if batch > 1:
            continue
        for backend in backends(device):
            with attention("none", backend):
                record.measure(f"velocity, batch 1, {backend}", lambda s=step: timed(s.velocity, device))
    release(device)


def _guidance(record: Record, step: GuidedStep, prm: ProcessRewardModel, mask: Mask) -> None:
    """The step without and with the gradient of the process reward, and the overhead of it (paper: +2.4 %)."""
    device = record.device
    unguided = record.measure(f"step without guidance, mask {mask}", lambda: timed(step.unguided, device))
    record.measure(f"gradient of 8 blocks, mask {mask}", lambda: timed(lambda: step.gradient(prm), device))
    ways = {"sequential": lambda: step.sequential(prm)}
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        ways["own stream"] = lambda: step.own_stream(prm, stream)

    def compared(name: str) -> Values:
        # Counting runs in Python between the kernels, which is no good across streams.
        values = timed(ways[name], device, count=name == "sequential")
        baseline = unguided["seconds"] if unguided else None
        if isinstance(baseline, float):
            values["overhead"] = float(values["seconds"] or 0.0) / baseline - 1
        return values

    for name in ways:
        record.measure(f"guided step, {name}, mask {mask}", lambda n=name: compared(n))


@torch.no_grad()
def compiled(record: Record) -> None:
    """The velocity with every block compiled: the first call, which compiles, and the following ones."""
    setup, device = setup_of(record), record.device
    with family_of(setup) as family:
        transformer = generator_of(family, device)
        step = GuidedStep(family, transformer, 1, device)
        with attention("none"):
            before = step.velocity()
            record.measure("velocity, eager", lambda: timed(step.velocity, device))
            family.compile_blocks(transformer, compiler(device))

            def first() -> Values:
                began = time.perf_counter()
                after = step.velocity()
                difference = float((after - before).norm() / before.norm())
                return {"seconds": time.perf_counter() - began, "relative_difference": difference}

            record.measure("velocity, compiled, first call", first)
            record.measure("velocity, compiled", lambda: timed(step.velocity, device, count=False))


def gradient(record: Record) -> None:
    """The process reward's gradient by batch, and what the convolution of the patch embedding costs of it."""
    setup, device = setup_of(record), record.device
    with family_of(setup) as family:
        prm = build_prm(family, setup, device)
        for batch in (1, 2, 4):
            step = GuidedStep(family, prm.trunk, batch, device)
            record.measure(f"gradient, batch {batch}", lambda s=step: timed(lambda: s.gradient(prm), device))
            embed = prm.trunk.get_submodule("x_embedder")

            def embedding(x: torch.Tensor = step.x, embed: nn.Module = embed) -> None:
                leaf = x.to(family.dtype).requires_grad_(True)
                torch.autograd.grad(embed(leaf).sum(), leaf)

            record.measure(f"patch embedding, batch {batch}", lambda e=embedding: timed(e, device, count=False))
            release(device)
