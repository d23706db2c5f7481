"""What of DeepSpeed's options a recipe may set."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from euphonium.config import LearnerPoolConfig, OptimizerConfig
from euphonium.errors import ConfigError
from learners.engine.options import OWNED, check_options, frozen_options, prefetch_blocks, training_options

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def test_options_reach_deepspeed() -> None:
    pool = LearnerPoolConfig(deepspeed={"reduce_bucket_size": 7, "overlap_comm": False})
    check_options(pool)
    for options in (
        training_options(pool, OPTIMIZER, torch.float32, whole_below=3),
        frozen_options(pool, torch.float32),
    ):
        made = DeepSpeedZeroConfig(**options["zero_optimization"])
        assert (made.stage, made.reduce_bucket_size, made.overlap_comm) == (3, 7, False)
        assert not made.memory_efficient_linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 2}, r"pools\.learner\.deepspeed\.stage: .* leave it out"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights: it rounds"),
        ({"stage3_param_persistence_threshold": 5}, r"set pools\.learner\.persistence_threshold; leave it out"),
        ({"stage3_prefetch_buket_size": 5}, "has no such field; did you mean 'stage3_prefetch_bucket_size'"),
        ({"nonsense": 5}, "nonsense: DeepSpeed's section zero_optimization has no such field"),
        ({"reduce_bucket_size": -1}, r"pools\.learner\.deepspeed\.reduce_bucket_size: Input should be greater"),
    ],
)
def test_what_is_not_for_recipes_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(LearnerPoolConfig(deepspeed=options))


def test_a_recipe_of_a_reward_model_has_its_learner_at_the_root() -> None:
    pool = LearnerPoolConfig(deepspeed={"stage3_param_persistence_threshold": 5})
    with pytest.raises(ConfigError, match=r"^learner\.deepspeed\.stage3.*: set learner\.persistence_threshold; leave"):
        check_options(pool, "learner")


def test_options_are_numbers_and_switches() -> None:
    with pytest.raises(ValidationError):
        LearnerPoolConfig.model_validate({"deepspeed": {"reduce_bucket_size": [1]}})


def test_what_is_owned_are_deepspeeds_names() -> None:
    fields = DeepSpeedZeroConfig.model_fields.items()
    assert {field.alias or name for name, field in fields} >= OWNED.keys()


def test_whole_blocks_are_prefetched_unless_the_recipe_says_otherwise() -> None:
    def prefetched(block: int, **own: int) -> object:
        options = training_options(LearnerPoolConfig(deepspeed=own), OPTIMIZER, torch.bfloat16, whole_below=0)
        prefetch_blocks(options, block)
        return options["zero_optimization"].get("stage3_prefetch_bucket_size")

    assert prefetched(340_000_000) == 340_000_000
    assert prefetched(1000) is None
    assert prefetched(340_000_000, stage3_prefetch_bucket_size=9) == 9
