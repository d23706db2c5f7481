"""All roles on the same GPUs, by fractions: whole runs on a Ray cluster that counts two GPUs, which are none."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig, dump_config
from euphonium.errors import ResourcesError
from orchestrator.learning.launcher import Launch, torch_trainer
from orchestrator.learning.placement import placement_groups, wait_placed
from tests.process import Process

pytestmark = pytest.mark.ray
SHARES = {"learner": 0.6, "rollout": 0.2, "prm": 0.1, "orm": 0.1}
SHARED = (*(f"pools.{role}.num_gpus={share}" for role, share in SHARES.items()), "pools.rollout.sleep=true")
# Without it the last bits of the rewards depend on which requests met.
STRICT = ("pools.prm.merge=false", "pools.orm.merge=false", "evaluation.clips=0", "iterations=3")


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[str]:
    """Address of a cluster of one node; this process has joined it."""
    import ray
    from ray.cluster_utils import Cluster

    # Workers cannot import the tests: what is defined here travels to them whole.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def gpus_of(namespace: str, *names: str) -> dict[str, list[str]]:
    import ray

    handles = {name: ray.get_actor(name, namespace=namespace) for name in names}
    seen = lambda _self: ray.get_runtime_context().get_accelerator_ids()["GPU"]  # noqa: E731
    return {name: ray.get(handle.__ray_call__.remote(seen), timeout=120) for name, handle in handles.items()}


def numbers(run: Path) -> list[dict[str, Any]]:
    kept = ("reward", "process", "advantage", "policy", "eval", "staleness", "iteration")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name.split("/")[0] in kept} for record in records]


@pytest.mark.slow
def test_a_run_whose_roles_share_two_gpus_has_the_numbers_of_one_whose_do_not(
    tiny_recipe_file: Callable[..., RunConfig], tmp_path: Path, two_gpus: str
) -> None:
    import ray

    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(tiny_recipe_file(tmp_path, *STRICT)))
    shared = Process("train", str(path), "name=shared", *SHARED, env={"RAY_ADDRESS": two_gpus})
    shared.wait_for("all roles are up")
    found = gpus_of("euphonium-shared", "rollout-0", "rollout-1", "prm-0", "orm-0")
    # Ray has given each a part of one GPU, next to the ranks, of which no two fit on one.
    used = {gpu: sum(SHARES[name.partition("-")[0]] for name, gpus in found.items() if gpu in gpus) for gpu in "01"}
    assert all(len(gpus) == 1 for gpus in found.values())
    assert max(used.values()) <= 1 - SHARES["learner"] + 1e-6
    assert ray.available_resources()["GPU"] == pytest.approx(2 - 2 * 0.6 - 2 * 0.2 - 0.1 - 0.1)
    assert shared.finish() == 0, shared.output

    apart = Process("train", str(path), "name=apart", env={"RAY_ADDRESS": two_gpus})
    assert apart.finish() == 0, apart.output
    assert numbers(tmp_path / "runs" / "shared") == numbers(tmp_path / "runs" / "apart")


def note_gpu(settings: dict[str, Any]) -> None:
    """What a rank does here: writes down what Ray Train gave it, and stays until it is told to go."""
    import ray.train
    import torch.distributed as dist

    context, folder = ray.train.get_context(), Path(settings["folder"])
    (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    noted = {
        "gpu": gpu, "visible": os.environ["CUDA_VISIBLE_DEVICES"], "local_rank": context.get_local_rank(),
        "backend": dist.get_backend(),
    }  # fmt: skip
    (folder / f"{context.get_world_rank()}.part").write_text(json.dumps(noted))
    (folder / f"{context.get_world_rank()}.part").rename(folder / f"{context.get_world_rank()}.json")
    while not (folder / "go").exists():
        time.sleep(0.1)


class Actor:
    def gpu(self) -> str:
        import ray

        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return str(gpu)


def test_actors_take_what_the_ranks_leave(make_config: Callable[..., RunConfig], tmp_path: Path, two_gpus: str) -> None:
    """Two actors of 0.4 that come first share a GPU, and a rank finds no room; after the ranks, each has its own."""
    import ray

    pool = make_config("pools.learner.num_gpus=0.6", "pools.learner.start_timeout_s=60").pools.learner
    actor = ray.remote(num_gpus=0.4, num_cpus=0.1)(Actor)
    first = [actor.remote() for _ in range(2)]
    assert ray.get([member.gpu.remote() for member in first]) == ["0", "0"]

    others = placement_groups()
    launch = Launch(torch_trainer(note_gpu, {"folder": str(tmp_path)}, pool, "placed", tmp_path).fit, "ranks")
    launch.start()
    said: list[str] = []
    impatient = pool.model_copy(update={"start_timeout_s": 8.0})
    with pytest.raises(
        ResourcesError, match=r"GPU: the pools reserve 1.2, the cluster has 2, [\d.]+ free.*0.6 of one GPU"
    ):
        asyncio.run(wait_placed(impatient, others, said.append))

    for member in first:
        ray.kill(member)
    asyncio.run(wait_placed(pool, others, said.append))
    after = [actor.remote() for _ in range(2)]
    assert sorted(ray.get([member.gpu.remote() for member in after])) == ["0", "1"]
    deadline = time.monotonic() + 60
    while len(noted := sorted(tmp_path.glob("?.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [json.loads(file.read_text()) for file in noted]
    (tmp_path / "go").touch()
    # Every rank sees the GPUs of both, and its own by its number.
    assert ranks == [{"gpu": str(rank), "visible": "0,1", "local_rank": rank, "backend": "gloo"} for rank in range(2)]
    assert launch.join(60)
    launch.check("the group")
    for member in after:
        ray.kill(member)
