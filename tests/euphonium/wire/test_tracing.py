"""Traces: once a process and iteration, while the iteration is under way."""

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.rollout import RolloutWorker
from euphonium.config import RunConfig
from euphonium.wire.tracing import Tracer, folder_of, tracing
from reward_servers.orm import OrmActor
from reward_servers.prm import PrmActor

MakeConfig = Callable[..., RunConfig]


def names(file: Path) -> set[str]:
    """Names of the operations in a trace."""
    return {event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}


def test_a_process_traces_one_unit_of_each_iteration_that_the_recipe_names(make_config: MakeConfig) -> None:
    config = make_config("profile.iterations=[2, 3]")
    first, second = Tracer(config, "rollout-0"), Tracer(config, "rollout-1")
    work = first.around(lambda x: x @ x)
    for iteration in range(1, 4):
        with tracing(config, iteration):
            for _ in range(2):
                work(torch.ones(2, 2))
        work(torch.ones(2, 2))
        with second.unit():
            torch.ones(1)
    assert not folder_of(config, 1).exists()
    for iteration in (2, 3):
        assert [file.name for file in folder_of(config, iteration).iterdir()] == ["rollout-0.json.gz"]
        assert "aten::matmul" in names(folder_of(config, iteration) / "rollout-0.json.gz")


def test_work_that_fails_fails_as_ever_and_an_iteration_that_fails_is_over(make_config: MakeConfig) -> None:
    config = make_config("profile.iterations=[1]")
    tracer = Tracer(config, "learner-0")
    with pytest.raises(ValueError, match="broken"), tracing(config, 1), tracer.unit():
        raise ValueError("broken")
    assert list(folder_of(config, 1).iterdir()) == []


def test_a_trace_that_cannot_be_written_ends_nothing(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config("profile.iterations=[1]")
    with tracing(config, 1), Tracer(config, "no/such/folder").unit():
        torch.ones(1)
    assert "a trace was not written" in caplog.text


def test_without_iterations_nothing_is_looked_for(make_config: MakeConfig) -> None:
    config = make_config()
    with tracing(config, 1), Tracer(config, "orm-0").unit():
        torch.ones(1)
    assert not config.run_dir.exists()


def test_reward_servers_trace_the_passes_of_their_own_threads(make_config: MakeConfig) -> None:
    config = make_config("profile.iterations=[1]")
    worker = RolloutWorker(config, torch.device("cpu"))
    prompt = "a red car moving left on a white background"
    prm, orm = PrmActor(0, config), OrmActor(0, config)
    shape = (2, *worker.family.latent_shape)
    with tracing(config, 1):
        conditioning = {name: tensor.numpy() for name, tensor in worker.conditioning(prompt).items()}

        async def ask() -> None:
            await prm.reward_and_gradient(np.zeros(shape, np.float32), 0.5, conditioning, True, prompt)
            await orm.score(np.zeros(shape, np.float32), [prompt] * 2)

        asyncio.run(ask())
    folder = folder_of(config, 1)
    assert sorted(file.name for file in folder.iterdir()) == ["orm-0.json.gz", "prm-0.json.gz"]
    assert any("backward" in name.lower() for name in names(folder / "prm-0.json.gz"))
    assert any("conv" in name for name in names(folder / "orm-0.json.gz"))
