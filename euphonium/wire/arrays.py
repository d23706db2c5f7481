"""Between numpy, which the object store shares without copying, and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor on the same memory.

    Arrays from the object store are read-only, of which ``torch.from_numpy`` warns every time; the view that it gets
    here only claims to be writable. Nobody may write to the result.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return torch.from_numpy(np.asarray(_Memory(interface, array)))


class _Memory:
    """Memory of an array, kept alive with it."""

    def __init__(self, interface: dict[str, Any], owner: NDArray[Any]) -> None:
        self.__array_interface__ = interface
        self.owner = owner
