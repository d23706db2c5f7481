"""The passes of a recipe of ``train``: those of its networks, and the learner's micro-batch."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
from torch import nn
from typing_extensions import override

from euphonium.config import RunConfig
from euphonium.generators.feature_cache import NEVER, FeatureCache
from euphonium.generators.lora import adapter_parameters
from orchestrator.plan.inputs import META, conditioning, states
from orchestrator.plan.meter import Cost, measure
from orchestrator.plan.networks import Meter, NetworkPasses, Size, checkpointing, freed_gradients, gather_unit, size_of


class Passes(NetworkPasses):
    """The passes of one recipe; each is measured when it is asked for, once."""

    def __init__(
        self,
        config: RunConfig,
        prm_blocks: int | None = None,
        device: torch.device = META,
        meter: Meter = measure,
    ) -> None:
        """Reads configurations; nothing is measured yet.

        Args:
            config: the recipe.
            prm_blocks: blocks of the process reward model's trunk; None without one.
            device: where to compute: the meta device, or a real one to compare with.
            meter: measures a computation.
        """
        self.config = config
        super().__init__(config.model, prm_blocks, device, meter)
        self.micro_step = self._kept("micro-step", self._micro_step)
        self.remembered = self._kept("remembered outputs", self._remembered)

    @override
    def _depends_on(self, name: str, size: int) -> dict[str, object]:
        objective, learner = self.config.objective, self.config.pools.learner
        return super()._depends_on(name, size) | {
            "objective": objective.model_dump(mode="json", include={"kind", "step_weights"}),
            "learner": learner.model_dump(
                mode="json", include={"gradient_checkpointing", "gather_blocks", "persistence_threshold"}
            ),
        }

    @cached_property
    def network_size(self) -> Size:
        """Size of the generator's network."""
        return self._kept_size("network", self._network_size)

    def _network_size(self) -> Size:
        pool = self.config.pools.learner
        trained = self._trained()
        blocks = pool.gather_blocks and self.config.model.lora is None
        return dataclasses.replace(
            size_of(self.network),
            trained=sum(p.numel() for p in trained.values()),
            unit=gather_unit(self.network, blocks=blocks),
            small=sum(p.numel() for p in self.network.parameters() if p.numel() < pool.persistence_threshold),
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        if self.config.model.lora is not None:
            return adapter_parameters(self.network)
        return {name: p for name, p in self.network.named_parameters() if self.generator.trains(name)}

    def _remembered(self, samples: int) -> Cost:
        """What is held of a pass of ``samples`` states until the next one, which may reuse it."""
        x, time = states(self.generator, samples, self.device)
        prompt = conditioning(self.generator, samples, self.device)
        with self.device:
            network = self.generator.build_transformer().to(self.device)
        cache = FeatureCache(network)
        with torch.no_grad():
            cache.compute("planned", samples, NEVER, lambda: self.generator.velocity(network, x, time, prompt))
        # On the meta device one of several networks passes, in a walk each of them.
        return Cost(cache.held_bytes * (len(cache.networks) if self.device.type == "meta" else 1), 0, 0)

    def _micro_step(self, rows: int) -> Cost:
        """Forward and backward pass of ``rows`` transitions; gradients are freed as ZeRO-3 reduces them."""
        from euphonium.dynamics import StepTable
        from learners.policy.objective import Transitions, evaluate_objective

        table: StepTable = self.generator.step_table(self.config.sampler)
        network = self.network.train()
        network.requires_grad_(False)
        trained = list(self._trained().values())
        for parameter in trained:
            parameter.requires_grad_(True)
        checkpointing(network, self.config.pools.learner.gradient_checkpointing)
        x, _ = states(self.generator, rows, self.device)
        batch = Transitions(
            states=x, next_states=torch.randn_like(x),
            steps=torch.full((rows,), 0 if self.config.objective.noises_samples else table.stochastic_steps[0]),
            log_probs=torch.zeros(rows, device=self.device), advantages=torch.ones(1, rows, device=self.device),
            gradients=None, conditioning=conditioning(self.generator, rows, self.device), weight=1.0,
        )  # fmt: skip
        settings = self.config.objective.model_copy(update={"kl": None, "ratio_normalisation": False})
        if settings.kind == "dpo":
            # References are counted apart, and a pair takes what two rows of the other take.
            settings = settings.model_copy(update={"kind": "nft"})

        def step() -> None:
            value = evaluate_objective(
                settings, table, lambda x, time, prompt: self.generator.velocity(network, x, time, prompt), batch
            )
            value.loss.backward()

        try:
            with freed_gradients(trained):
                return self._measure(step, self._resident())
        finally:
            checkpointing(network, False)
