"""Numpy arrays, which Ray's object store shares without copying, as torch tensors and back.

Numpy has no bfloat16. On the wire its values are opaque two-byte items (numpy's ``V2``): nobody computes with them by
accident, they are half as large as float32, and they come back as the very bfloat16 that were sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BFLOAT16 = np.dtype("V2")


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory; it must not be written to.

    Arrays from the object store are read-only, and ``torch.from_numpy`` warns of each of them. The array that it gets
    here claims to be writable.
    """
    if array.dtype == BFLOAT16:
        return as_tensor(array.view(np.int16)).view(torch.bfloat16)
    if array.flags.writeable:
        return torch.from_numpy(array)
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return torch.from_numpy(np.asarray(_Memory(interface, array)))


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A contiguous array of a tensor's values, which :func:`as_tensor` turns into the same tensor on the CPU.

    >>> as_tensor(as_array(torch.tensor([0.5, 1.0], dtype=torch.bfloat16)))
    tensor([0.5000, 1.0000], dtype=torch.bfloat16)
    """
    here = tensor.detach().cpu().contiguous()
    if here.dtype == torch.bfloat16:
        array: NDArray[Any] = here.view(torch.int16).numpy().view(BFLOAT16)
        return array
    plain: NDArray[Any] = here.numpy()
    return plain


class _Memory:
    """An array interface that keeps the owner of its memory alive."""

    def __init__(self, interface: dict[str, Any], owner: NDArray[Any]) -> None:
        self.__array_interface__ = interface
        self.owner = owner
