import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from euphonium.errors import LostActorError
from euphonium.wire.weights.channel import Channel, connect, listen

CPU = torch.device("cpu")


def buckets() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()},
        {"c": torch.tensor(2.5)},
    ]


def members(size: int, timeout_s: float = 20.0) -> list[Channel]:
    """All ends of a channel; each has to be made on a thread of its own, as they wait for each other."""
    store = listen(timeout_s)
    stores = [store, *(connect(f"127.0.0.1:{store.port}", timeout_s) for _ in range(size - 1))]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda r: Channel(stores[r], r, size, timeout_s, CPU), range(size)))


def taken(channel: Channel, transfer: int) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in channel.receive(transfer)}


def test_every_receiver_gets_every_tensor_of_every_transfer() -> None:
    sender, *receivers = members(3)
    for transfer in range(2):
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(taken, receiver, transfer) for receiver in receivers]
            sent = sender.send(transfer, ({n: t + transfer for n, t in bucket.items()} for bucket in buckets()))
            received = [answer.result(20) for answer in answers]
        expected = {name: tensor + transfer for bucket in buckets() for name, tensor in bucket.items()}
        assert sent == sum(t.numel() * t.element_size() for t in expected.values())
        for tensors in received:
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                assert tensors[name].dtype == tensor.dtype
                assert torch.equal(tensors[name], tensor)


def test_a_receiver_that_is_gone_is_an_error_for_the_sender_and_in_bounded_time() -> None:
    sender, receiver = members(2, timeout_s=3.0)
    del receiver
    began = time.monotonic()
    with pytest.raises(LostActorError, match="receiver of the weights is gone"):
        sender.send(0, [{"a": torch.zeros(1 << 22)}] * 4)
    assert time.monotonic() - began < 15


def test_a_sender_that_is_silent_is_an_error_for_the_receiver() -> None:
    _sender, receiver = members(2, timeout_s=2.0)
    with pytest.raises(LostActorError, match="sender of the weights is gone"):
        taken(receiver, 0)


def test_a_channel_without_all_members_does_not_come_about() -> None:
    store = listen(2.0)
    with pytest.raises(LostActorError, match="did not come about"):
        Channel(store, 0, 2, 2.0, CPU)


def test_nobody_at_the_address() -> None:
    with pytest.raises(LostActorError, match="cannot be reached"):
        connect("127.0.0.1:9", 1.0)
