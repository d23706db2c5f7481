"""Devices follow the reservation."""

import os
import subprocess
import sys

import pytest
import torch

from euphonium.wire.devices import local_device, reserved_device


def test_without_a_reservation_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert reserved_device(0) == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "libraries that look for a GPU themselves must find none"


def test_with_a_reservation_it_is_the_gpu_that_the_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reserved_device(0.5) == local_device() == torch.device("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_reward_models_follow_too() -> None:
    """In a process of its own, since torch looks for GPUs once."""
    code = (
        "from euphonium.wire.devices import reserved_device\n"
        "reserved_device(0)\n"
        "from euphonium.rewards.pretrained import device_of\n"
        "print(device_of(None))"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert found.stdout.strip() == "cpu"
