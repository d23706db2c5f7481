"""Where a network's tensors are: on the GPU, or in pinned host memory while other processes need the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from euphonium.wire.weights.manifest import split_into_buckets

# Pinned memory comes in powers of two: tensors share buffers of one, or a third of the memory would be lost.
BUFFER_BYTES = 1 << 30
ALIGNMENT = 64


class Sleeper:
    """A network that can leave its GPU and come back.

    Its parameters and buffers stay the same objects, so that whoever refers to them (names of published weights,
    compiled blocks) need not know. The host memory is reserved once and kept.

    Attributes:
        asleep: whether the tensors are in host memory.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """Takes note of a network; moves nothing.

        Args:
            network: the network, with all tensors on ``device`` or all on the CPU.
            device: where it works.
        """
        self._device = device
        self._tensors = {str(i): t for i, t in enumerate(itertools.chain(network.parameters(), network.buffers()))}
        self._host: dict[str, Tensor] = {}
        self.asleep = False

    def sleep(self) -> None:
        """Moves all tensors to host memory, and gives the GPU memory back; computing with them is an error then."""
        if self.asleep:
            return
        self._host = self._host or dict(self._host_memory())
        for name, tensor in self._tensors.items():
            self._host[name].copy_(tensor.data, non_blocking=True)
        self._wait()
        for name, tensor in self._tensors.items():
            tensor.data = self._host[name]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.asleep = True

    def wake(self) -> None:
        """Brings all tensors back."""
        if not self.asleep:
            return
        for name, tensor in self._tensors.items():
            tensor.data = self._host[name].to(self._device, non_blocking=True)
        self._wait()
        self.asleep = False

    def _host_memory(self) -> Iterator[tuple[str, Tensor]]:
        """Host memory for every tensor by name, cut out of common buffers."""
        sizes = {name: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for name, tensor in self._tensors.items()}
        for names in split_into_buckets(sizes, BUFFER_BYTES):
            total = sum(sizes[name] for name in names)
            buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            for name, part in zip(names, buffer.split([sizes[name] for name in names]), strict=True):
                like = self._tensors[name]
                yield name, part[: like.nbytes].view(like.dtype).view(like.shape)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
