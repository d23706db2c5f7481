"""The step that guided_step.py measures, in all the ways of taking it."""

from __future__ import annotations

import torch
from guided_step_networks import random_conditioning
from torch import Tensor, nn

from euphonium.dynamics import Guidance, StepTable, shifted_sigmas
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.rewards.process import ProcessRewardModel

GUIDED_STEP = 8


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
