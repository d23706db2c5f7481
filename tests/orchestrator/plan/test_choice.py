"""What the plan chooses for ``auto``: it fits, more memory gives no less, and a run keeps what it began with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig, dump_config, load_config
from euphonium.errors import ConfigError
from orchestrator.plan.choice import FILLED, as_recorded, choose, open_fields
from orchestrator.plan.fit import members_of
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.passes import Passes
from orchestrator.plan.plan import make_plan
from orchestrator.plan.sharing import fullest_gpu
from orchestrator.plan.workload import PassSizes
from tests.orchestrator.plan.models import medium

AUTO: dict[str, dict[str, Any]] = {
    "rollout": {"encode_on_cpu": True}, "prm": {"max_batch": "auto"}, "orm": {"decode_batch": "auto"},
    "learner": {"rows_per_micro_batch": "auto", "shard": "auto"},
}  # fmt: skip
PROCESS = {"outcome": [{"name": "icon", "type": "sprite_icon"}], "process": {"path": "none"}}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(shares: dict[str, float], **learner: Any) -> RunConfig:
        pools = {role: fields | {"num_gpus": shares.get(role, 0)} for role, fields in AUTO.items()}
        pools["learner"] |= learner
        rollout = {"prompts_per_iteration": 8, "group_size": 12, "samples_per_pass": "auto"}
        return medium("hunyuan-video", tmp_path / "model", pools=pools, rollout=rollout, rewards=PROCESS)

    return make


def four() -> int:
    return 4


WHOLE = dict.fromkeys(AUTO, 1.0)
SHARED = {"rollout": 0.25, "prm": 0.05, "orm": 0.1, "learner": 0.6}


@pytest.mark.parametrize(("shares", "memories"), [(WHOLE, (5, 6, 80)), (SHARED, (10, 13, 80))], ids=["apart", "shared"])
def test_what_is_chosen_fits_and_grows_with_the_memory(
    shares: dict[str, float], memories: tuple[float, ...], recipe: Callable[..., RunConfig]
) -> None:
    written = recipe(shares)
    before = None
    for gpu_gib in memories:
        config = choose(written, gpu_gib, four)
        assert not open_fields(config)
        sizes, room = PassSizes.of(config), Hardware(gpu_gib=FILLED * gpu_gib)
        members = members_of(Passes(config, 4), sizes, room)
        shared = fullest_gpu(members, room, overlapped=False)
        needed = [fit.gpu_gib for fit in members] if shared is None else [shared.needed_gib]
        # Costs of more than two samples are taken to grow evenly.
        assert max(needed) <= 1.01 * room.gpu_gib
        now = [sizes.rollout, sizes.prm, sizes.decode, sizes.learner]
        assert before is None or all(a <= b for a, b in zip(before, now, strict=True))
        before = now
    assert before is not None
    # These models are so small that a whole group is a short pass.
    assert before[0] == 12


def test_a_recipe_says_what_was_written_what_was_chosen_and_why(recipe: Callable[..., RunConfig]) -> None:
    written = recipe(WHOLE)
    config = choose(written, 80, four)
    assert set(config.planned) == set(open_fields(written))
    assert config.planned["rollout.samples_per_pass"].startswith("auto -> 12: ")
    assert config.planned["rollout.samples_per_pass"].endswith("GiB of 80")
    assert "an update of" in config.planned["pools.learner.shard"]
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    # Once is enough.
    assert choose(config, 8, four) == config
    # What a recipe says in numbers stays.
    fixed = written.model_copy(update={"rollout": written.rollout.model_copy(update={"samples_per_pass": 3})})
    assert choose(fixed, 80, four).rollout.samples_per_pass == 3


def test_passes_are_long_enough_and_no_longer() -> None:
    """At full size: a clip of HunyuanVideo fills an H100 alone, and so does the gradient of its process reward."""
    auto = [
        "rollout.samples_per_pass=auto", "pools.prm.max_batch=auto", "pools.orm.decode_batch=auto",
        "pools.learner.rows_per_micro_batch=auto", "pools.learner.shard=auto",
    ]  # fmt: skip
    config = load_config(Path("recipes/hunyuan-video/euphonium.yaml"), auto)
    chosen = choose(config, 80, lambda: 8)
    assert chosen.rollout.samples_per_pass == chosen.pools.prm.max_batch == chosen.pools.orm.decode_batch == 1
    assert not make_plan(chosen, Hardware(), 8).problems


def test_a_learner_keeps_weights_whole_where_that_saves_its_time(recipe: Callable[..., RunConfig]) -> None:
    # With one row a micro-batch, the collectives of so small a model take long; one rank has none.
    rows = {"rows_per_micro_batch": 1}
    assert choose(recipe(WHOLE, num_workers=16, **rows), 80, four).pools.learner.shard == "optimizer"
    assert choose(recipe(WHOLE, num_workers=1, **rows), 80, four).pools.learner.shard == "full"


def test_pools_on_cpus_take_the_defaults(recipe: Callable[..., RunConfig]) -> None:
    config = choose(recipe({}), 80, four)
    pools = config.pools
    chosen = (config.rollout.samples_per_pass, pools.prm.max_batch, pools.orm.decode_batch)
    assert chosen == (16, 16, 1)
    assert (pools.learner.rows_per_micro_batch, pools.learner.shard) == (16, "full")
    assert config == choose(recipe({}), None, four)
    mixed = choose(recipe({"rollout": 1}), 80, four)
    assert (mixed.rollout.samples_per_pass, mixed.pools.prm.max_batch) == (12, 16)


def test_the_pairs_of_a_refresh_are_chosen_and_null_takes_all(tmp_path: Path) -> None:
    def pairs(given: object, gpu_gib: float = 80, share: float = 1) -> int | str | None:
        refresh = {"pairs_per_micro_batch": given, "pairs_per_update": 12}
        process = {"outcome": PROCESS["outcome"], "process": {"path": "none", "refresh": refresh}}
        pools = {"prm_refresh": {"num_gpus": share}}
        config = choose(medium("hunyuan-video", tmp_path / "m", rewards=process, pools=pools), gpu_gib, four)
        assert config.rewards.process is not None
        assert config.rewards.process.refresh is not None
        return config.rewards.process.refresh.pairs_per_micro_batch

    assert (pairs(None), pairs(5), pairs("auto"), pairs("auto", share=0)) == (None, 5, 12, 12)
    assert pairs("auto", gpu_gib=2.2) in range(1, 12)


def test_without_a_stated_memory_and_without_a_plan_passes_are_the_smallest(recipe: Callable[..., RunConfig]) -> None:
    def missing() -> int:
        raise ConfigError("no process reward model")

    for gpu_gib, blocks, why in ((None, four, "pools.gpu_memory_gib"), (80, missing, "no process reward model")):
        config = choose(recipe(WHOLE), gpu_gib, blocks)
        assert (config.rollout.samples_per_pass, config.pools.learner.rows_per_micro_batch) == (1, 1)
        assert config.pools.learner.shard == "full"
        assert all(note.startswith("auto -> ") and why in note for note in config.planned.values())


def test_a_resumed_run_has_the_numbers_that_it_began_with(recipe: Callable[..., RunConfig]) -> None:
    written = recipe(WHOLE)
    began = choose(written, 80, four)
    again = as_recorded(written, dump_config(began))
    assert again == began
    assert choose(again, 8, four) == began
    # A field that was a number before has no note of its own.
    fixed = began.model_copy(update={"planned": {}})
    noted = as_recorded(written, dump_config(fixed)).planned["pools.prm.max_batch"]
    assert noted.endswith("of the run's last recipe")
    # A run from before there was such a field leaves it open.
    assert open_fields(as_recorded(written, "rollout: {group_size: 4}")) == open_fields(written)


def test_nobody_computes_with_what_is_not_chosen(recipe: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.samples_per_pass: auto is chosen by `euphonium train`"):
        PassSizes.of(recipe(WHOLE))
