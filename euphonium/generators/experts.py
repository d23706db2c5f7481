"""Two transformers that share the steps of a walk: one for high noise, one for low (Wan 2.2 A14B)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

# Names of the two, which are also the components of the pipeline.
NAMES = ("transformer", "transformer_2")


class Experts(ModelMixin, PeftAdapterMixin):
    """Two transformers as one network: every row of a batch passes the one that its time belongs to.

    Under ZeRO-3 all ranks must pass the same modules in the same order, so a transformer without rows then computes one
    that counts nothing.

    Attributes:
        transformer: for times from ``boundary`` up.
        transformer_2: for times below.
        boundary: time in the network's own range.
        trained: which of the two are trained; the other gets no gradients.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = []
    _repeated_blocks: ClassVar[list[str]] = []

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float, trained: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        self.transformer = high
        self.transformer_2 = low
        self.boundary = boundary
        self.trained = trained
        for name in ("_no_split_modules", "_repeated_blocks"):
            setattr(self, name, getattr(high, name))

    @property
    def untrained_modules(self) -> str | None:
        """Pattern of the names of the modules that are not trained; None if all are."""
        others = [name for name in NAMES if name not in self.trained]
        return rf"({'|'.join(others)})\..*" if others else None

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False, **entries: Tensor
    ) -> tuple[Tensor]:
        """Like the forward passes of the two, whose arguments all have the batch in front."""
        if timestep.is_meta:
            # What is planned is a pass in which all rows have one time.
            planned = getattr(self, self.trained[-1])
            return planned(hidden_states, timestep, return_dict=False, **entries)
        high = timestep >= self.boundary
        places, outputs, idle = [], [], []
        for name, chosen in zip(NAMES, (high, ~high), strict=True):
            rows = chosen.nonzero().squeeze(1)
            if not len(rows) and not self._is_partitioned:
                continue
            read = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=rows.device)
            with nullcontext() if name in self.trained else torch.no_grad():
                output = getattr(self, name)(
                    hidden_states[read], timestep[read], return_dict=False, **{n: t[read] for n, t in entries.items()}
                )[0]
            if len(rows):
                places.append(rows)
                outputs.append(output)
            else:
                idle.append(0 * output.sum())
        whole = torch.cat(outputs)[torch.cat(places).argsort()]
        return (whole + torch.stack(idle).sum(),) if idle else (whole,)

    @property
    def _is_partitioned(self) -> bool:
        return hasattr(next(self.parameters()), "ds_id")
