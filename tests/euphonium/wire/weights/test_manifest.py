import numpy as np
import pytest
import torch

from euphonium.errors import TrainingError
from euphonium.wire.arrays import as_tensor
from euphonium.wire.weights.manifest import (
    WeightManifest,
    load_tensors,
    pack,
    split_into_buckets,
    unpack,
    verified,
    verify,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "c": torch.arange(6).view(2, 3),
    }


def test_packed_tensors_read_back_bit_by_bit() -> None:
    bucket, manifest = pack(tensors())
    for raw in bucket:
        raw.flags.writeable = False
    read = dict(unpack(manifest, bucket))
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_bucket_shares_the_memory_of_its_tensors() -> None:
    tensor = torch.zeros(4)
    bucket, _ = pack({"w": tensor})
    tensor.fill_(1)
    assert bucket[0].view(np.float32).tolist() == [1, 1, 1, 1]


def test_a_flipped_bit_is_noticed() -> None:
    bucket, manifest = pack(tensors())
    bucket[1][11] ^= 1
    with pytest.raises(TrainingError, match="damaged"):
        verify(manifest, bucket)
    whole = WeightManifest(version=1, kind="policy", buckets=(manifest,))
    with pytest.raises(TrainingError, match="damaged"):
        load_tensors(verified(whole, [bucket]), {name: torch.empty_like(tensor) for name, tensor in tensors().items()})


def test_buckets_keep_order_and_limit() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 20, "f": 1}
    assert split_into_buckets(sizes, 10) == [["a", "b"], ["c", "d"], ["e"], ["f"]]


def test_weights_that_do_not_fit_are_refused() -> None:
    bucket, description = pack({"w": torch.zeros(2)})
    manifest = WeightManifest(version=1, kind="policy", buckets=(description,))
    target = {"w": torch.ones(2)}
    load_tensors(verified(manifest, [bucket]), target)
    assert torch.equal(target["w"], torch.zeros(2))
    with pytest.raises(TrainingError, match="no counterpart"):
        load_tensors(verified(manifest, [bucket]), {"w": torch.ones(3)})
    with pytest.raises(TrainingError, match="lack 1 tensors, for example v"):
        load_tensors(verified(manifest, [bucket]), {"w": torch.ones(2), "v": torch.ones(1)})


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_become_tensors_without_copy_or_warning() -> None:
    array = np.arange(5, dtype=np.float32)
    array.flags.writeable = False
    tensor = as_tensor(array)
    assert tensor.data_ptr() == array.__array_interface__["data"][0]
    assert not array.flags.writeable
