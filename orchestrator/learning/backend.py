"""How the ranks of a group talk to each other: by what their processes see, not by what they have reserved.

A cluster may count GPUs that are none (``ray start --num-gpus``), to try out on CPUs how roles share them.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from typing_extensions import override

log = logging.getLogger(__name__)


class _ByDevice(_TorchBackend):
    @override
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        seen = set(worker_group.execute(torch.cuda.is_available))
        if len(seen) > 1:
            raise RuntimeError("some learner ranks see a GPU and others see none, though all have reserved one")
        if seen == {False}:
            log.warning("the learner ranks have reserved GPUs, but torch sees none there: they compute on CPUs")
        backend = "nccl" if seen == {True} else "gloo"
        super().on_start(worker_group, dataclasses.replace(backend_config, backend=backend))


@dataclass
class GpuGroup(TorchConfig):
    """Ranks with GPUs, which talk through NCCL; through gloo where no rank sees a GPU."""

    @property
    @override
    def backend_cls(self) -> type[_ByDevice]:
        """What sets the group up."""
        return _ByDevice
