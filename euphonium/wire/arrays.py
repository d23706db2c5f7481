"""Views of numpy arrays, which Ray's object store shares without copying, as torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory; it must not be written to.

    Arrays from the object store are read-only, and ``torch.from_numpy`` warns of each of them. The array that it gets
    here claims to be writable.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return torch.from_numpy(np.asarray(_Memory(interface, array)))


class _Memory:
    """An array interface that keeps the owner of its memory alive."""

    def __init__(self, interface: dict[str, Any], owner: NDArray[Any]) -> None:
        self.__array_interface__ = interface
        self.owner = owner
