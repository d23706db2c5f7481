"""What does not fit is named with the field that changes it, and the change helps."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig
from orchestrator.plan.fit import RoleFit, fits_of, largest
from orchestrator.plan.hardware import GIB, Hardware
from orchestrator.plan.memory import COUNTED, Item, RoleMemory, learner_memory
from orchestrator.plan.nodes import Objects, place
from orchestrator.plan.passes import Passes
from orchestrator.plan.plan import make_plan
from orchestrator.plan.timing import Split, iteration_time, speeds
from orchestrator.plan.workload import PassSizes, workload_of
from tests.orchestrator.plan.models import medium, recipe

SMALL = Hardware(gpu_gib=1.0, reserved_gib=0.0)
POOL = {"num_gpus": 1}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(learner: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        pools = {"rollout": POOL, "prm": POOL, "orm": POOL, "learner": POOL | {"num_workers": 2} | (learner or {})}
        return medium("hunyuan-video", tmp_path / "model", pools=pools, **settings)

    return make


def of(role: str, config: RunConfig, gpu_gib: float) -> RoleFit:
    passes = Passes(config, prm_blocks=4)
    hardware = replace(SMALL, gpu_gib=gpu_gib)
    return next(fit for fit in fits_of(passes, PassSizes.of(config), hardware) if fit.role == role)


def at_most(change: dict[str, Any], role: str) -> dict[str, Any]:
    return {"pools": {"rollout": POOL, "prm": POOL, "orm": POOL, "learner": POOL} | {role: POOL | change}}


@pytest.mark.parametrize(("role", "field"), [("prm", "pools.prm.max_batch"), ("orm", "pools.orm.decode_batch")])
def test_the_largest_pass_that_fits_is_named(role: str, field: str, tmp_path: Path) -> None:
    def planned(batch: int, gpu_gib: float) -> RoleFit:
        return of(
            role, medium("hunyuan-video", tmp_path / "m", **at_most({field.rpartition(".")[2]: batch}, role)), gpu_gib
        )

    room = planned(2, 1000).gpu_gib * 1.001
    refused = planned(4, room)
    assert f"{field}: 4 needs {refused.gpu_gib:.1f} GiB of the {room:g}" in refused.advice
    assert refused.advice.endswith("; 2 fits")
    assert not planned(2, room).advice


def test_where_one_sample_is_too_much_another_remedy_is_named(config: Callable[..., RunConfig]) -> None:
    assert "no number fits: set model.vae_tiling: true" in of("orm", config(), 0.1).advice
    assert "no number fits" in of("rollout", config(), 0.1).advice


def test_the_remedies_of_the_learner_in_turn(config: Callable[..., RunConfig]) -> None:
    def needed(**learner: Any) -> float:
        return of("learner", config(learner), 1000).gpu_gib

    one, two = (needed(rows_per_micro_batch=rows, gradient_checkpointing=True) for rows in (1, 2))
    assert one < two
    advice = of("learner", config({"rows_per_micro_batch": 2, "gradient_checkpointing": True}), (one + two) / 2).advice
    assert advice.startswith("pools.learner.rows_per_micro_batch: 2")
    assert advice.endswith("1 fits")
    advice = of("learner", config({"rows_per_micro_batch": 1}), one * 0.999).advice
    assert "gradient_checkpointing" in advice
    advice = of("learner", config({"rows_per_micro_batch": 1, "gradient_checkpointing": True}), one * 0.999).advice
    assert "num_workers: 2" in advice
    assert "3 ranks fit" in advice
    advice = of("learner", config({"gradient_checkpointing": True}), 0.5).advice
    assert "offload_optimizer" in advice


def test_zero_shares_states_and_offloading_moves_them(config: Callable[..., RunConfig]) -> None:
    passes = Passes(config({"rows_per_micro_batch": 1}))
    trained = passes.network_size.trained
    sizes = PassSizes.of(passes.config)
    held = {ranks: {item.name: item for item in learner_memory(passes, sizes, ranks).items} for ranks in (1, 4)}
    assert held[1]["float32 weights and Adam's moments"].nbytes == 12 * trained
    assert held[4]["float32 weights and Adam's moments"].nbytes == 3 * trained
    away = Passes(config({"rows_per_micro_batch": 1, "offload_optimizer": True}))
    before, after = (learner_memory(p, sizes, 1) for p in (passes, away))
    assert before.gpu_gib(SMALL) - after.gpu_gib(SMALL) > 12 * trained / GIB
    assert after.host_gib(SMALL) - before.host_gib(SMALL) > 12 * trained / GIB


def test_ranks_that_share_samples_share_activations(config: Callable[..., RunConfig]) -> None:
    settings = {"rows_per_micro_batch": 1, "num_workers": 4}
    passes = Passes(config(settings))
    alone, shared = PassSizes.of(passes.config), PassSizes.of(config(settings | {"sequence_parallel": 4}))
    before, after = ({i.name: i.nbytes for i in learner_memory(passes, sizes, 4).items} for sizes in (alone, shared))
    assert after.pop("micro-batch of 1") == before.pop("micro-batch of 1") / 4
    assert after == before
    work = workload_of(passes.config, passes.generator)
    apart, together = (speeds(passes, sizes, work, SMALL) for sizes in (alone, shared))
    assert together.micro_step == apart.micro_step / 4
    assert together.exchanged_bytes > apart.exchanged_bytes == 0
    split = Split(rollout=1, prm=0, orm=1, learner=4)
    apart_s, together_s = (iteration_time(s, work, split, SMALL, overlapped=False) for s in (apart, together))
    # Four times the micro-batches of a quarter of the time each, and the exchange.
    assert together_s.busy["learner"] == pytest.approx(apart_s.busy["learner"])
    assert together_s.exposed > apart_s.exposed


def long_clip(cfg_scale: float | None, **changes: Any) -> RoleFit:
    """The learner's part of a plan for 14 billion parameters and clips of 81 frames."""
    wan = {"path": "Wan-AI/Wan2.1-T2V-14B-Diffusers", "frames": 81, "height": 720, "width": 1280, "dtype": "bfloat16"}
    learner = POOL | {"num_workers": 8, "rows_per_micro_batch": 1, "gradient_checkpointing": True}
    pools = {"rollout": POOL, "orm": POOL, "learner": learner | changes}
    return of("learner", recipe(wan | {"cfg_scale": cfg_scale}, pools=pools), 80)


def test_a_clip_that_is_too_long_for_a_gpu_is_shared() -> None:
    assert long_clip(None).advice.endswith("28 ranks fit, or these with pools.learner.sequence_parallel: 2")
    assert not long_clip(None, sequence_parallel=2).advice


@pytest.mark.slow
def test_twice_the_rows_of_a_long_clip_are_shared_by_more() -> None:
    alone, shared = long_clip(5.0), long_clip(5.0, sequence_parallel=8)
    assert alone.advice.startswith("pools.learner.sequence_parallel: 1: a rank of the learner needs")
    found = re.search(r"set it to (\d+), and num_workers to (\d+)$", alone.advice)
    assert found is not None
    sharing, ranks = map(int, found.groups())
    assert not long_clip(5.0, sequence_parallel=sharing, num_workers=ranks).advice
    assert not shared.advice
    # Gradients are reduced in float32.
    assert next(item for item in shared.memory.items if item.name == "float32 copy of it").nbytes > 0


def refreshed(folder: Path, refresh: dict[str, Any], share: float = 1) -> RunConfig:
    process = {"path": "none", "refresh": {"pairs_per_update": 8} | refresh}
    rewards = {"outcome": [{"name": "icon", "type": "sprite_icon"}], "process": process}
    pools = {"rollout": POOL, "prm": POOL, "orm": POOL, "learner": POOL, "prm_refresh": {"num_gpus": share}}
    return medium("hunyuan-video", folder / "model", rewards=rewards, pools=pools)


def test_a_refresh_is_a_training_in_one_process(tmp_path: Path) -> None:
    plan = make_plan(refreshed(tmp_path, {"every": 4, "updates": 10}), Hardware(), 4)
    fit = next(fit for fit in plan.fits if fit.role == "prm_refresh")
    parameters = Passes(refreshed(tmp_path, {}), 4).prm_size.parameters
    assert fit.memory.resting_gib(SMALL) == pytest.approx(8 * parameters / GIB)
    # Weights of now, of the start and of before, moments, gradients, and activations of 16 states.
    assert fit.memory.gpu_gib(SMALL) > 24 * parameters / GIB + fit.memory.items[2].nbytes / GIB
    assert fit.memory.items[2].name == "micro-batch of 8 pairs"
    assert plan.time is not None
    assert plan.time.refresh > 0
    assert plan.petaflops["prm_refresh"] > 0
    assert plan.gpus == 5
    assert not plan.problems


def test_the_refresh_names_its_field(tmp_path: Path) -> None:
    room = of("prm_refresh", refreshed(tmp_path, {"pairs_per_micro_batch": 2}), 1000).gpu_gib * 1.001
    advice = of("prm_refresh", refreshed(tmp_path, {}), room).advice
    assert advice.startswith("rewards.process.refresh.pairs_per_micro_batch: 8 needs")
    assert advice.endswith("on the actor of the refresh; 2 fits")
    assert "gradient_checkpointing: true" in of("prm_refresh", refreshed(tmp_path, {}), 0.1).advice
    saving = of("prm_refresh", refreshed(tmp_path, {"gradient_checkpointing": True}), 1000)
    assert saving.gpu_gib < of("prm_refresh", refreshed(tmp_path, {}), 1000).gpu_gib


def test_phases_are_not_held_together() -> None:
    items = (Item("weights", GIB), Item("forward", 2 * GIB, "a"), Item("step", 3 * GIB, "b"))
    assert RoleMemory(items, 1).gpu_gib(SMALL) == 4
    assert RoleMemory(items, 0.5).gpu_gib(SMALL) == 4
    assert RoleMemory(items, 0).gpu_gib(SMALL) == 0


def test_convolutions_count_elements() -> None:
    def memory_of(samples: int) -> RoleMemory:
        return RoleMemory((Item("decoding", samples),), 1, largest=samples * COUNTED / 3)

    assert largest(memory_of, 16, SMALL) == 2


def test_nodes_are_filled_and_hold_what_travels(config: Callable[..., RunConfig]) -> None:
    memory = RoleMemory((), 1)
    fits = [RoleFit(role, members, memory, 1, 10) for role, members in (("rollout", 3), ("orm", 1), ("learner", 4))]
    objects = Objects(iteration=6 * GIB, publication=GIB, kinds=1, ahead=0, groups_of_actor=2 * GIB)
    first, second = place(fits, objects, Hardware(gpus_per_node=4))
    assert (first.members, second.members) == ({"learner": 4}, {"rollout": 3, "orm": 1})
    # All trajectories and three versions of the weights; what three actors drew and one version.
    assert (first.store_gib, second.store_gib) == (9, 7)
    assert first.host_gib == 4 * 10 + 9


def test_the_workload_is_what_the_roles_do(config: Callable[..., RunConfig]) -> None:
    passes = Passes(config())
    work = workload_of(passes.config, passes.generator)
    assert (work.samples, work.steps, work.rows) == (32, 8, 4 * 7)
    # Eight groups of 28 rows, four of which leave the state that all samples share; two a micro-batch, two ranks.
    assert work.states == 25
    assert work.micro_batches(2, 2) == 8 * 13 / 2
    assert work.micro_batches(5, 3) == 14  # 40 pieces


def test_what_is_remembered_for_reuse_is_in_the_plan(tmp_path: Path) -> None:
    def planned(section: dict[str, Any], **settings: Any) -> float:
        config = medium("wan", tmp_path / "model", rollout={"prompts_per_iteration": 8, "group_size": 4} | section,
                        pools={"rollout": POOL}, **settings)  # fmt: skip
        return of("rollout", config, 1000).gpu_gib

    # Of 2 x 10 x 10 tokens of 256 numbers, with and without the prompt: the first block's output and what it and the
    # others added, in float32; of all four samples of the group, whether they pass together or one by one.
    remembered = 4 * 2 * 200 * 256 * 3 * 4
    for size in (1, 4):
        less, more = (planned({"samples_per_pass": size, **reuse}) for reuse in ({}, {"reuse_below": 0.1}))
        assert (more - less) * GIB == pytest.approx(remembered, rel=1e-6)
    evaluation = {"prompts": 2, "reuse_below": 0.1}
    assert (
        planned({"samples_per_pass": 1}, evaluation=evaluation)
        == planned({"samples_per_pass": 1}, evaluation={"prompts": 2}) + remembered / 4 / GIB
    )
