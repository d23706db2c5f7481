"""The networks of a generator and of its process reward model, measured on the meta device: passes without gradients of
weights, which every command needs, and the training of a process reward model.

Every block is run, none is extrapolated: the 13 billion parameters of HunyuanVideo take seconds. Costs are of
activations; weights are counted apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from euphonium.config import ModelConfig
from euphonium.generators.backbone import block_classes
from euphonium.generators.components import Loadable, component_classes
from euphonium.generators.described import describe_generator
from euphonium.generators.generator import Generator
from euphonium.generators.lora import add_adapter
from orchestrator.plan.cache import remembered
from orchestrator.plan.inputs import META, conditioning, states
from orchestrator.plan.meter import Cost, measure

# Measures a computation, given the tensors that were there before.
Meter = Callable[[Callable[[], object], Iterable[torch.Tensor]], Cost]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a network is.

    Attributes:
        parameters: number of parameters.
        weight_bytes: bytes of its parameters.
        trained: number of those that a run trains.
        unit: parameters that ZeRO-3 gathers at a time: the largest block, or the largest layer.
        small: parameters of tensors that ZeRO-3 keeps whole on every rank for their size.
    """

    parameters: int
    weight_bytes: int
    trained: int
    unit: int = 0
    small: int = 0

    @property
    def said(self) -> str:
        """The number of parameters as people say it: ``12.82 B``, ``9.4 M``."""
        return f"{self.parameters / 1e9:.2f} B" if self.parameters >= 1e8 else f"{self.parameters / 1e6:.2g} M"

    def kept_whole(self, *, whole_weights: bool) -> int:
        """Parameters that every rank of the learner keeps whole: all of them, or the small tensors'."""
        return self.parameters if whole_weights else self.small


class NetworkPasses:
    """The passes of one generator; each is measured when it is asked for, once."""

    def __init__(
        self,
        model: ModelConfig,
        prm_blocks: int | None = None,
        device: torch.device = META,
        meter: Meter = measure,
    ) -> None:
        """Reads configurations; nothing is measured yet.

        Args:
            model: the recipe's generator.
            prm_blocks: blocks of the process reward model's trunk; None without one.
            device: where to compute: the meta device, or a real one to compare with.
            meter: measures a computation.
        """
        self.model = model
        self.generator: Generator = describe_generator(model)
        self.prm_blocks = prm_blocks
        self.device = device
        self._measure = meter
        self.velocity = self._kept("velocity", self._velocity)
        self.score = self._kept("score", lambda samples: self._prm_pass(samples, with_gradient=False))
        self.gradient = self._kept("gradient", lambda samples: self._prm_pass(samples, with_gradient=True))
        self.decode = self._kept("decode", self._decode)
        self.pair_step = self._kept("pair step", lambda pairs: self._pair_step(pairs, saving=False))
        self.saving_pair_step = self._kept("saving pair step", lambda pairs: self._pair_step(pairs, saving=True))

    def _kept(self, name: str, run: Callable[[int], Cost]) -> Callable[[int], Cost]:
        """A pass as a function of its size, whose costs on the meta device are kept on disk."""

        @lru_cache
        def cost(size: int) -> Cost:
            if self.device.type != "meta":
                return run(size)
            return Cost(**remembered(self._depends_on(name, size), lambda: dataclasses.asdict(run(size))))

        return cost

    def _depends_on(self, name: str, size: int) -> dict[str, object]:
        """What a measurement depends on, besides code."""
        pipeline = self.generator.pipeline
        return {
            "pass": name,
            "size": size,
            "model": self.model.model_dump(mode="json", exclude={"path", "revision", "negative_prompt"}),
            "components": [pipeline.component_config(part) for part in (self.generator.backbone, "vae")],
            "latents": self.generator.latent_shape,
            "index": pipeline.index(),
            "blocks": self.prm_blocks,
        }

    @cached_property
    def network(self) -> nn.Module:
        """The generator's network, with the adapter that a recipe trains."""
        with self.device:
            network = self.generator.build_transformer().to(self.device)
            if self.model.lora is not None:
                add_adapter(network, self.model.lora)
        return network

    @cached_property
    def weights(self) -> Size:
        """Size of the generator's network, all of it frozen."""
        return self._kept_size("weights", lambda: size_of(self.network))

    def _kept_size(self, name: str, count: Callable[[], Size]) -> Size:
        found = remembered(self._depends_on(name, 0), lambda: dataclasses.asdict(count()))
        return Size(**{part: int(number) for part, number in found.items()})

    def _velocity(self, samples: int) -> Cost:
        """A rollout's velocity for ``samples`` states, with the negative prompt's rows of classifier-free guidance."""
        x, time = states(self.generator, samples, self.device)
        prompt = conditioning(self.generator, samples, self.device)
        self.network.eval().requires_grad_(False)
        with torch.no_grad():
            return self._measure(lambda: self.generator.velocity(self.network, x, time, prompt), self._resident())

    def _resident(self) -> list[torch.Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    @cached_property
    def prm(self) -> Any:
        """The process reward model, or None."""
        if self.prm_blocks is None:
            return None
        from euphonium.rewards.process import ProcessRewardModel

        with self.device:
            model = ProcessRewardModel(self.generator, self.prm_blocks).to(self.device)
        return model.eval().requires_grad_(False)

    @cached_property
    def prm_size(self) -> Size:
        """Size of the process reward model."""
        return self._kept_size("process reward model", self._prm_size)

    def _prm_size(self) -> Size:
        # Reward models are gathered layer by layer.
        return dataclasses.replace(size_of(self.prm), unit=gather_unit(self.prm, blocks=False))

    def _prm_pass(self, samples: int, *, with_gradient: bool) -> Cost:
        x, time = states(self.generator, samples, self.device)
        prompt = conditioning(self.generator, samples, self.device)
        resident = [*self.prm.parameters(), *self.prm.buffers()]
        if with_gradient:
            return self._measure(lambda: self.prm.reward_and_gradient(x, time, prompt), resident)
        with torch.no_grad():
            return self._measure(lambda: self.prm(x, time, prompt), resident)

    def training_step(self, *, saving: bool) -> Callable[[int], Cost]:
        """The process reward model's micro-batch as a function of its pairs.

        Args:
            saving: whether activations are computed again in the backward pass.
        """
        return self.saving_pair_step if saving else self.pair_step

    def _pair_step(self, pairs: int, *, saving: bool) -> Cost:
        """Forward and backward pass of the process reward model on pairs, in the generator's type.

        Trained weights are float32; autocast's copies of them in the generator's type are counted apart.
        """
        x, time = states(self.generator, 2 * pairs, self.device)
        prompt = conditioning(self.generator, 2 * pairs, self.device)
        model = self.prm.train().requires_grad_(True)
        checkpointing(model.trunk, saving)
        try:
            with freed_gradients(model.parameters()):
                return self._measure(
                    lambda: model(x, time, prompt).sum().backward(), [*model.parameters(), *model.buffers()]
                )
        finally:
            checkpointing(model.trunk, False)
            model.eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any:
        """The VAE with the recipe's memory savers."""
        return self.generator.load_working_vae(self.device)

    @cached_property
    def vae_size(self) -> Size:
        """Size of the VAE."""
        return size_of(self.vae.network)

    def _decode(self, samples: int) -> Cost:
        """Decoding ``samples`` finished samples to float32 pixels."""
        latents, _ = states(self.generator, samples, self.device)
        return self._measure(lambda: self.vae.decode(latents), self.vae.network.parameters())

    @property
    def latent_bytes(self) -> int:
        """Bytes of a sample's latents, float32."""
        return 4 * prod(self.generator.latent_shape)

    @cached_property
    def encoder_bytes(self) -> int:
        """Bytes of the weights that read prompts."""
        return sum(
            _encoder_parameters(self.generator.folder / name, kind) * self.generator.dtype.itemsize
            for name, kind in _components(self.generator, *self.generator.text_networks)
        )

    @cached_property
    def image_encoder_bytes(self) -> int:
        """Bytes of the weights that read pictures besides the VAE, float32."""
        return sum(
            4 * _encoder_parameters(self.generator.folder / name, kind)
            for name, kind in _components(self.generator, "image_encoder")
            if name in self.generator.image_components
        )


def prompt_bytes(generator: Generator) -> int:
    """Bytes of one prompt's conditioning, in the generator's type."""
    return sum(tensor.nbytes for tensor in conditioning(generator, 1).values())


@contextmanager
def freed_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frees gradients as soon as they are there, while it is open, as ZeRO-3 does when it has reduced them."""
    hooks = [parameter.register_post_accumulate_grad_hook(_free) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def checkpointing(network: nn.Module, wanted: bool) -> None:
    """Turns the recomputation of activations on or off, where a network has it."""
    if wanted:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    elif hasattr(network, "disable_gradient_checkpointing"):
        network.disable_gradient_checkpointing()  # type: ignore[operator]


def size_of(network: nn.Module) -> Size:
    """Size of a network of which nothing is trained."""
    parameters = list(network.parameters())
    return Size(sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters), 0)


def _components(generator: Generator, *beginnings: str) -> list[tuple[str, Loadable]]:
    """Folder and class of every component of a pipeline whose name begins with one of some words."""
    classes = component_classes(generator.pipeline)
    return [(name, kind) for name, kind in sorted(classes.items()) if name.startswith(beginnings)]


@lru_cache
def _encoder_parameters(folder: Path, kind: Loadable) -> int:
    with META:
        if hasattr(kind, "load_config"):
            built = kind.from_config(kind.load_config(folder))
        else:
            built = kind(kind.config_class.from_pretrained(folder))
    return sum(p.numel() for p in built.parameters())


def gather_unit(network: nn.Module, *, blocks: bool) -> int:
    """Parameters of the largest module that ZeRO-3 gathers at a time."""
    own = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in network.modules())
    if not blocks:
        return own
    names = block_classes(network)
    sizes = [sum(p.numel() for p in m.parameters()) for m in network.modules() if type(m).__name__ in names]
    return max([own, *sizes])
