"""DeepSpeed's options of the models of a learner group, and which of them a recipe may set."""

from __future__ import annotations

import contextlib
import difflib
import sys
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from euphonium.config import LearnerPoolConfig, OptimizerConfig, RewardOptimizerConfig, TrainingGroupConfig
from euphonium.errors import ConfigError

# DeepSpeed's own configuration: JSON values.
Options = dict[str, Any]

_ROUNDS = "it rounds weights or gradients, so that the learner would not compute what rollout actors do"
# Fields of DeepSpeed's section that are not for recipes, and why; ``{learner}`` is the recipe's section of the ranks.
OWNED = {
    "stage": "learners are made for stage 3",
    "stage3_param_persistence_threshold": "set {learner}.persistence_threshold",
    "offload_optimizer": "set {learner}.offload_optimizer",
    "cpu_offload": "set {learner}.offload_optimizer",
    "cpu_offload_param": "set {learner}.offload_references",
    "cpu_offload_use_pin_memory": "set {learner}.offload_optimizer",
    "offload_param": "set {learner}.offload_references",
    "leaf_module": "set {learner}.gather_blocks",
    "memory_efficient_linear": "it computes in another order than rollout actors do",
    "zero_quantized_weights": _ROUNDS,
    "zero_quantized_nontrainable_weights": _ROUNDS,
    "zero_quantized_gradients": _ROUNDS,
    "zenflow": "it updates weights late",
    "elastic_checkpoint": "checkpoints are this project's own",
    "load_from_fp32_weights": "checkpoints are this project's own",
    "pipeline_loading_checkpoint": "checkpoints are this project's own",
}


def training_options(
    pool: TrainingGroupConfig,
    settings: OptimizerConfig | RewardOptimizerConfig,
    dtype: torch.dtype,
    *,
    whole_below: int,
) -> Options:
    """DeepSpeed options of a model in training; gradients are accumulated by hand, so accumulation is 1 there.

    Args:
        pool: settings of the learner group.
        settings: settings of the optimiser.
        dtype: type of the weights.
        whole_below: parameters with fewer elements are kept whole on every rank; after pieces are overwritten, they
            need :meth:`ZeroEngine.weights_changed`.
    """
    zero: Options = {
        "stage3_param_persistence_threshold": whole_below,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        **pool.deepspeed,
    }
    if pool.offload_optimizer:
        zero["offload_optimizer"] = _host_memory()
    options = _options(zero, dtype)
    if dtype != torch.float32:
        # An update adds up hundreds of micro-batches; in bfloat16 the sum would lose the later ones to rounding.
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options | {
        "gradient_clipping": settings.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def frozen_options(pool: LearnerPoolConfig, dtype: torch.dtype) -> Options:
    """DeepSpeed options of a model that is not trained, and whose pieces may be overwritten at any time."""
    zero: Options = {"stage3_param_persistence_threshold": 0, **pool.deepspeed}
    # The second copies of a node would not see pieces that are overwritten.
    zero.pop("zero_hpz_partition_size", None)
    if pool.offload_references:
        zero["offload_param"] = _host_memory()
    return _options(zero, dtype)


def _options(zero: Options, dtype: torch.dtype) -> Options:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's own linear replaces torch's for the whole process and computes in another order: the learner
        # must give the very numbers that rollout actors got.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, **zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }


def _host_memory() -> Options:
    return {"device": "cpu", "pin_memory": torch.cuda.is_available()}


def prefetch_blocks(options: Options, block: int) -> None:
    """Lets ZeRO-3 gather the next block while one is computed: by default it prefetches less than a large block has.

    Args:
        options: options of the model; one that the recipe sets stays.
        block: parameters of the largest block.
    """
    zero: Options = options["zero_optimization"]
    if block > _zero_config().model_fields["prefetch_bucket_size"].default:
        zero.setdefault("stage3_prefetch_bucket_size", block)


def check_options(pool: TrainingGroupConfig, section: str = "pools.learner") -> None:
    """Checks the recipe's own options of DeepSpeed.

    Args:
        pool: settings of the learner group.
        section: the recipe's section that holds them, for errors.

    Raises:
        ConfigError: DeepSpeed does not know one or refuses its value, or it is not for recipes.
    """
    if not pool.deepspeed:
        return
    model, field = _zero_config(), f"{section}.deepspeed"
    known = [described.alias or name for name, described in model.model_fields.items()]
    for name in pool.deepspeed:
        if name in OWNED:
            raise ConfigError(f"{field}.{name}: {OWNED[name].format(learner=section)}; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, [n for n in known if n not in OWNED], n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{field}.{name}: DeepSpeed's section zero_optimization has no such field{meant}")
    try:
        model(stage=3, **pool.deepspeed)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{field}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _zero_config() -> type[BaseModel]:
    # DeepSpeed logs to what is standard output when it is imported, which belongs to the command.
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found: type[BaseModel] = DeepSpeedZeroConfig
    return found
