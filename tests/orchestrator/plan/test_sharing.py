"""Who meets on a GPU, and what they need there together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan.fit import RoleFit
from orchestrator.plan.hardware import GIB, Hardware
from orchestrator.plan.memory import TEXT_ENCODERS, Item, RoleMemory
from orchestrator.plan.plan import make_plan
from orchestrator.plan.sharing import fullest_gpu, gpus_filled, sharing_advice
from tests.orchestrator.plan.models import medium

BARE = Hardware(gpu_gib=10.0, reserved_gib=0.0, fragmentation=0.0)
# Weights of 1 GiB, and 2 GiB at work.
ITEMS = (Item("weights", GIB), Item("pass", 2 * GIB, "work", activations=True))


def role(name: str, members: int, share: float, items: tuple[Item, ...] = ITEMS) -> RoleFit:
    memory = RoleMemory(items, share)
    return RoleFit(name, members, memory, memory.gpu_gib(BARE), memory.host_gib(BARE))


def test_those_who_work_in_turn_do_not_add_up() -> None:
    fits = [role("rollout", 1, 0.3), role("orm", 1, 0.1), role("learner", 1, 0.6)]
    gpu = fullest_gpu(fits, BARE, overlapped=False)
    assert gpu is not None
    assert gpu.members == {"rollout": 1, "orm": 1, "learner": 1}
    assert (gpu.sampling_gib, gpu.learning_gib) == (3 + 3 + 1, 1 + 1 + 3)
    both = fullest_gpu(fits, BARE, overlapped=True)
    assert both is not None
    assert both.needed_gib == 9


def test_a_policy_that_sleeps_makes_room_for_the_learner_and_takes_host_memory() -> None:
    asleep = (Item("weights", GIB, sleeps=True), *ITEMS[1:])
    gpu = fullest_gpu([role("rollout", 1, 0.4, asleep), role("learner", 1, 0.6)], BARE, overlapped=False)
    assert gpu is not None
    assert (gpu.sampling_gib, gpu.learning_gib) == (3 + 1, 0 + 3)
    assert role("rollout", 1, 0.4, asleep).host_gib == role("rollout", 1, 0.4).host_gib + 1


def test_the_worst_company_counts_and_every_gpu_has_its_rank() -> None:
    """Without ranks six actors of 0.15 could meet; on two GPUs with a rank each, two can."""
    fits = [role("rollout", 4, 0.15), role("learner", 2, 0.6)]
    assert gpus_filled(fits) == 2
    gpu = fullest_gpu(fits, BARE, overlapped=False)
    assert gpu is not None
    assert gpu.members == {"rollout": 2, "learner": 1}
    elsewhere = fullest_gpu([*fits, role("orm", 1, 1.0)], BARE, overlapped=False)
    assert elsewhere is not None
    assert elsewhere.members == {"rollout": 4}


def test_a_refresh_works_while_all_others_rest() -> None:
    fits = [role("rollout", 1, 0.2), role("prm_refresh", 1, 0.2, (Item("training", 5 * GIB, "update"),))]
    fits.append(role("learner", 1, 0.6))
    gpu = fullest_gpu(fits, BARE, overlapped=False)
    assert gpu is not None
    assert (gpu.sampling_gib, gpu.learning_gib, gpu.refreshing_gib) == (3 + 0 + 1, 1 + 0 + 3, 1 + 5 + 1)
    assert gpu.needed_gib == 7
    advice = sharing_advice(gpu, fits, dataclasses.replace(BARE, gpu_gib=6), sleeps=False)
    assert "needs 7.0 GiB of the 6 while the process reward model is refreshed; give pools.prm_refresh" in advice
    without = fullest_gpu([fits[0], fits[2]], BARE, overlapped=False)
    assert without is not None
    assert without.refreshing_gib == 0


@pytest.mark.parametrize(
    ("pools", "gpus"),
    [
        ([("learner", 2, 0.6), ("rollout", 2, 0.4)], 2),
        ([("learner", 2, 0.6), ("rollout", 2, 0.5)], 3),
        ([("learner", 8, 0.52), ("rollout", 8, 0.32), ("prm", 4, 0.16), ("orm", 4, 0.16)], 8),
        ([("learner", 4, 1.0), ("rollout", 1, 2.0), ("orm", 2, 0.5), ("prm", 1, 0.0)], 7),
    ],
)
def test_gpus_are_counted_one_by_one(pools: list[tuple[str, int, float]], gpus: int) -> None:
    assert gpus_filled([role(*pool) for pool in pools]) == gpus


def test_without_parts_of_gpus_nothing_is_shared() -> None:
    assert fullest_gpu([role("rollout", 2, 1.0), role("learner", 2, 1.0)], BARE, overlapped=False) is None


def test_remedies_fit_the_phase() -> None:
    encoders = (*ITEMS, Item(TEXT_ENCODERS, 6 * GIB))
    sampling = [role("rollout", 1, 0.4, encoders), role("learner", 1, 0.6, (Item("states", 2 * GIB),))]
    learning = [role("rollout", 1, 0.4), role("learner", 1, 0.6, (Item("pass", 10 * GIB, "work"),))]
    for fits, sleeps, remedy in (
        (sampling, False, "set pools.rollout.encode_on_cpu: true"),
        (learning, False, "set pools.rollout.sleep: true"),
        (learning, True, "offload_optimizer"),
    ):
        gpu = fullest_gpu(fits, BARE, overlapped=False)
        advice = sharing_advice(gpu, fits, BARE, sleeps=sleeps)
        assert advice.startswith("pools: a GPU that 1 rollout, 1 learner share needs 11.0 GiB of the 10")
        assert remedy in advice
        assert not sharing_advice(gpu, fits, Hardware(gpu_gib=11.0), sleeps=sleeps)


@pytest.fixture
def plan_of_one_gpu(tmp_path: Path) -> Callable[..., Any]:
    def plan(hardware: Hardware, embeddings: str | None = None, **rollout: Any) -> Any:
        prompts = {"train": "train.txt", "evaluation": "held_out.txt", "embeddings": embeddings}
        pools = {"rollout": {"num_gpus": 0.3} | rollout, "orm": {"num_gpus": 0.1}, "learner": {"num_gpus": 0.6}}
        return make_plan(medium("hunyuan-video", tmp_path / "model", pools=pools, prompts=prompts), hardware)

    return plan


def test_a_plan_of_one_gpu_names_the_remedy_and_the_remedy_helps(plan_of_one_gpu: Callable[..., Any]) -> None:
    free = Hardware(reserved_gib=0.0)
    roomy = plan_of_one_gpu(free)
    assert roomy.gpus == 1
    assert not roomy.problems
    assert roomy.shared.members == {"rollout": 1, "orm": 1, "learner": 1}
    # One after the other: all that the roles compute, and all that travels.
    assert roomy.time.total >= sum(roomy.time.busy.values())
    asleep = plan_of_one_gpu(free, sleep=True)
    weights = next(item.nbytes for item in roomy.fits[0].memory.items if item.name == "weights") / GIB
    assert roomy.shared.learning_gib - asleep.shared.learning_gib == pytest.approx(weights)
    on_cpu = plan_of_one_gpu(free, encode_on_cpu=True)
    encoders = next(item.nbytes for item in roomy.fits[0].memory.items if item.name == TEXT_ENCODERS) / GIB
    assert roomy.shared.sampling_gib - on_cpu.shared.sampling_gib == pytest.approx(encoders)
    stored = plan_of_one_gpu(free, embeddings="store")
    assert roomy.shared.sampling_gib - stored.shared.sampling_gib == pytest.approx(encoders)
    assert all(item.name != TEXT_ENCODERS for item in stored.fits[0].memory.items)
    tight = Hardware(reserved_gib=0.0, gpu_gib=roomy.shared.needed_gib * 0.999)
    (problem,) = plan_of_one_gpu(tight).problems
    assert "a GPU that 1 rollout, 1 orm, 1 learner share" in problem
