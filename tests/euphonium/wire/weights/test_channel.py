import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from euphonium.errors import LostActorError
from euphonium.wire.weights import channel
from euphonium.wire.weights.channel import Channel, connect, digest, flattened, listen
from tests.checkout import environment

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


RECEIVER = """
import sys, time, torch
from euphonium.wire.weights import channel
from euphonium.wire.weights.channel import Channel, connect
store = connect(sys.argv[1], 20.0)
channel = Channel(store, 1, 2, 20.0, torch.device("cpu"))
print("joined", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_dies_or_hangs_after_it_was_called_ends_the_transfer(by: signal.Signals) -> None:
    """Between the order and the broadcast: the sender gives up by its own deadline, whatever the library does."""
    store = listen(20.0)
    receiver = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, f"127.0.0.1:{store.port}"], stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    try:
        sender = Channel(store, 0, 2, 20.0, CPU)
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "joined\n"
        sender._timeout_s = 3.0
        receiver.send_signal(by)
        began = time.monotonic()
        with pytest.raises(LostActorError, match="receiver of the weights is gone"):
            sender.send(0, [{"a": torch.zeros(1 << 22)}] * 4)
        assert time.monotonic() - began < 15
    finally:
        receiver.kill()
        receiver.wait()


def test_nobody_enters_the_library_before_all_members_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's first call cannot be interrupted: the meeting is in the store, with a deadline."""
    entered: list[object] = []
    monkeypatch.setattr(channel, "_group", lambda *arguments: entered.append(arguments))
    store = listen(1.0)
    began = time.monotonic()
    with pytest.raises(LostActorError, match="did not come about"):
        Channel(store, 0, 2, 1.0, CPU)
    assert time.monotonic() - began < 10
    assert not entered


def test_damaged_bytes_are_noticed() -> None:
    flat, manifest = flattened(buckets()[0], CPU)
    assert digest(flat) == manifest.checksum
    for position in range(0, sum(entry.nbytes for entry in manifest.entries), 7):
        damaged = flat.clone()
        damaged[position] ^= 1
        assert digest(damaged) != manifest.checksum
