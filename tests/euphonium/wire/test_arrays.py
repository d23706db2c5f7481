"""Tensors travel as arrays and come back as they were."""

import pickle

import numpy as np
import pytest
import torch

from euphonium.wire.arrays import as_array, as_tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 2), (0, 4), ()])
def test_values_and_types_survive_the_wire(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).mul(100).to(dtype)
    sent = pickle.loads(pickle.dumps(as_array(tensor), protocol=5))
    back = as_tensor(sent)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert sent.nbytes == tensor.nbytes


def test_read_only_arrays_are_shared() -> None:
    for tensor in (torch.arange(4.0), torch.arange(4.0).bfloat16()):
        array = as_array(tensor)
        array.flags.writeable = False
        assert as_tensor(array).data_ptr() == array.ctypes.data


def test_nobody_computes_with_bfloat16_by_accident() -> None:
    with pytest.raises(TypeError):
        as_array(torch.ones(2, dtype=torch.bfloat16)) + np.float32(1)
