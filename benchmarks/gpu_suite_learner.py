"""Parts ``learner`` and ``ratio`` of gpu_suite.py: the learner's micro-step, and how well it repeats the rollout."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_suite_tools import (
    Backend,
    Mask,
    Record,
    Values,
    attention,
    backends,
    compiler,
    generator_of,
    release,
    setup_of,
    timed,
)
from guided_step_networks import family_of, random_conditioning
from torch import Tensor, nn

from euphonium.config import LoraConfig, ObjectiveConfig, RewardOptimizerConfig
from euphonium.dynamics import StepTable, shifted_sigmas
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.lora import add_adapter
from learners.engine.local import LocalEngine
from learners.policy.objective import ObjectiveValue, Transitions, evaluate_objective, replayed_log_probs

# The paper's preset: 16 steps, shift 5, eps = 0.3125, so eta = sqrt(2 eps).
NUM_STEPS = 16
SHIFT = 5.0
ETA = 0.625**0.5
OBJECTIVE = ObjectiveConfig()
# Steps whose transitions are compared, from noise to data.
STEPS = (1, 5, 9, 13)
GROUP = 4


def table() -> StepTable:
    """The sampler of all rows."""
    return StepTable.build("dance", shifted_sigmas(NUM_STEPS, SHIFT), eta=ETA)


def rows_of(family: Generator, rows: int, device: torch.device) -> Transitions:
    """A micro-batch of random transitions; their log-probabilities are not filled in."""
    state = torch.randn(rows, *family.latent_shape, device=device)
    return Transitions(
        states=state,
        next_states=state + 0.1 * torch.randn_like(state),
        steps=torch.arange(rows) % (NUM_STEPS - 1),
        log_probs=torch.zeros(rows, device=device),
        advantages=torch.ones(1, rows, device=device),
        gradients=None,
        conditioning=random_conditioning(family, rows, device),
        weight=1 / rows,
    )


def learner(record: Record) -> None:
    """Forward and backward pass of a micro-batch with checkpointing: of all weights, then of an adapter."""
    with family_of(setup_of(record)) as family:
        transformer = generator_of(family, record.device)
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        steps = table()

        def velocity(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
            return family.velocity(transformer, x, time, conditioning)

        def micro_step(rows: Transitions, backward: Callable[[Tensor], None]) -> Values:
            old = replayed_log_probs(steps, velocity, rows)

            def once() -> ObjectiveValue:
                batch = Transitions(**{**vars(rows), "log_probs": old})
                value = evaluate_objective(OBJECTIVE, steps, velocity, batch)
                backward(value.loss)
                return value

            values = timed(once, record.device)
            release(record.device)
            return values

        def measure(name: str, count: int, mask: Mask, backward: Callable[[Tensor], None]) -> None:
            def work() -> Values:
                return micro_step(rows_of(family, count, record.device), backward)

            with attention(mask):
                record.measure(f"{name}, {count} rows, mask {mask}", work)

        cases: tuple[tuple[int, Mask], ...] = ((1, "none"), (2, "none"), (1, "as built"), (4, "none"))
        hooks = _drop_gradients(transformer)
        for count, mask in cases:
            measure("all weights", count, mask, lambda loss: loss.backward())
        for hook in hooks:
            hook.remove()
        engine = _adapter_engine(transformer, record.device)
        for count, mask in cases[:2]:
            measure("adapter", count, mask, lambda loss: engine.backward(loss, last=True))


def compiled_learner(record: Record) -> None:
    """Forward and backward pass of a micro-batch with checkpointed and compiled blocks."""
    with family_of(setup_of(record)) as family:
        transformer = generator_of(family, record.device)
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        _drop_gradients(transformer)
        steps, rows = table(), rows_of(family, 1, record.device)

        def velocity(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
            return family.velocity(transformer, x, time, conditioning)

        def micro_step() -> None:
            evaluate_objective(OBJECTIVE, steps, velocity, rows).loss.backward()

        record.measure("eager", lambda: timed(micro_step, record.device))
        family.compile_blocks(transformer, compiler(record.device))
        record.measure("compiled, first call", lambda: timed(micro_step, record.device, repeats=1, count=False))
        record.measure("compiled", lambda: timed(micro_step, record.device, count=False))


def _drop_gradients(transformer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Trains all weights, and lets go of each gradient once it is there, as ZeRO does after its reduction."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    transformer.requires_grad_(True)
    return [p.register_post_accumulate_grad_hook(drop) for p in transformer.parameters()]


def _adapter_engine(transformer: nn.Module, device: torch.device) -> LocalEngine:
    add_adapter(transformer, LoraConfig())
    return LocalEngine(transformer, RewardOptimizerConfig(updates=1), device, averages=False)


@dataclass(frozen=True)
class Kernel:
    """How a pass computes attention."""

    mask: Mask
    backend: Backend = "default"

    def __str__(self) -> str:
        return f"mask {self.mask}" + ("" if self.backend == "default" else f" ({self.backend})")


def ratio(record: Record) -> None:
    """Importance ratios of transitions that a batched rollout pass drew, in passes as the learner makes them."""
    with family_of(setup_of(record)) as family:
        transformer = generator_of(family, record.device)
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        comparison = Comparison(family, transformer, record.device)
        record.measure("scale of the velocity", comparison.scale_to_unit)
        fast, *others = (Kernel("none", backend) for backend in backends(record.device))
        drawn = comparison.draw(fast)
        for kernel, rows in ((fast, 1), (fast, GROUP), *((other, 1) for other in others), (Kernel("all true"), 1)):
            record.measure(
                f"rollout {fast}, batch {GROUP}; learner {kernel}, batch {rows}",
                lambda k=kernel, r=rows: comparison.ratios(drawn, k, r),
            )
        built = Kernel("as built")
        record.measure(
            f"rollout {built}, batch {GROUP}; learner {built}, batch 1",
            lambda: comparison.ratios(comparison.draw(built), built, 1),
        )


class Comparison:
    """Transitions of random states, and their log-probabilities by different passes of one network."""

    def __init__(self, family: Generator, transformer: nn.Module, device: torch.device) -> None:
        self.family, self.transformer, self.device = family, transformer, device
        self.table = table()
        torch.manual_seed(1)
        data = torch.randn(GROUP, *family.latent_shape, device=device)
        noise = torch.randn_like(data)
        sigmas = [float(self.table.sigmas[k]) for k in STEPS]
        self.states = [(1 - sigma) * data + sigma * noise for sigma in sigmas]
        self.conditioning = random_conditioning(family, GROUP, device)
        self._velocities: list[Tensor] = []

    def velocity(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's velocity, which is also kept for comparison."""
        v = self.family.velocity(self.transformer, x, time, conditioning)
        self._velocities.append(v.detach())
        return v

    @torch.no_grad()
    def scale_to_unit(self) -> Values:
        """Scales the network's last layer so that velocities vary by 1, about as much as a trained model's."""
        times = torch.full((1,), 0.5, device=self.device)
        one = {name: tensor[:1] for name, tensor in self.conditioning.items()}
        spread = float(self.velocity(self.states[0][:1], times, one).std())
        for parameter in self.transformer.get_submodule("proj_out").parameters():
            parameter.div_(spread)
        self._velocities.clear()
        return {"std_before": spread}

    @torch.no_grad()
    def draw(self, kernel: Kernel) -> list[Transitions]:
        """One group of transitions for every step in ``STEPS``, drawn and scored in one pass each."""
        drawn = []
        for k, states in zip(STEPS, self.states, strict=True):
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(k)).to(self.device)
            times = torch.full((GROUP,), float(self.table.times[k]), device=self.device)
            with attention(kernel.mask, kernel.backend):
                mean = self.table.mean(k, states, self.velocity(states, times, self.conditioning))
            following = self.table.sample(k, mean, noise)
            advantages = torch.tensor([[1.0, -1.0] * (GROUP // 2)], device=self.device)
            drawn.append(
                Transitions(
                    states=states, next_states=following, steps=torch.full((GROUP,), k),
                    log_probs=self.table.log_prob(k, following, mean), advantages=advantages, gradients=None,
                    conditioning=self.conditioning, weight=1.0,
                )
            )  # fmt: skip
        self.expected = torch.cat(self._velocities)
        self._velocities.clear()
        return drawn

    def ratios(self, drawn: list[Transitions], kernel: Kernel, rows: int) -> Values:
        """Deviation of the ratios from 1 where the learner takes ``rows`` rows at a time.

        As in training, gradients are enabled and blocks checkpointed; there is no backward pass.
        """
        ratios, clips = [], []
        self.transformer.train().requires_grad_(True)
        for group in drawn:
            for begin in range(0, GROUP, rows):
                with attention(kernel.mask, kernel.backend):
                    value = evaluate_objective(OBJECTIVE, self.table, self.velocity, _cut(group, begin, rows))
                # Not the value itself: its loss holds the activations of the pass.
                ratios.append(value.ratio)
                clips.append(value.clipped)
                del value
        self.transformer.eval().requires_grad_(False)
        deviations = (torch.cat(ratios).double() - 1).abs().tolist()
        found = torch.cat(self._velocities)
        self._velocities.clear()
        return {
            "rows": len(deviations),
            "ratio_mean": statistics.mean(deviations),
            "ratio_p90": statistics.quantiles(deviations, n=10)[-1],
            "ratio_max": max(deviations),
            f"over_{OBJECTIVE.clip_range:g}": sum(d > OBJECTIVE.clip_range for d in deviations) / len(deviations),
            "clipped": float(torch.cat(clips).mean()),
            "velocity_error": float((found - self.expected).norm() / self.expected.norm()),
        }


def _cut(group: Transitions, begin: int, rows: int) -> Transitions:
    part = slice(begin, begin + rows)
    return Transitions(
        states=group.states[part], next_states=group.next_states[part], steps=group.steps[part],
        log_probs=group.log_probs[part], advantages=group.advantages[:, part], gradients=None,
        conditioning={name: tensor[part] for name, tensor in group.conditioning.items()}, weight=group.weight,
    )  # fmt: skip
