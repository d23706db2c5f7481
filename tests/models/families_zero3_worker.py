"""One rank of ZeRO-3 that takes one optimiser step with each given generator; writes what it saw as JSON."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from actors.rollout import encode_one
from core.config import LearnerPoolConfig, ModelConfig, OptimizerConfig
from learners.zero3 import ZeroPolicy, quiet_deepspeed
from models.generators.base import open_generator

PROMPT = "a red car"
CPU = torch.device("cpu")


def step(model: dict[str, Any], *, checkpointing: bool) -> dict[str, float]:
    """How far the partitioned policy is from a rollout actor's, before and after a step on a toy loss."""
    family = open_generator(ModelConfig.model_validate(model))
    pool = LearnerPoolConfig(gradient_checkpointing=checkpointing, persistence_threshold=0)
    conditioning = encode_one(family.prompt_encoder(CPU, {PROMPT: family.folder.parent / "first_frame.png"}), PROMPT)
    x, time = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    rollout = family.load_transformer(CPU)
    with torch.no_grad():
        expected = family.velocity(rollout, x, time, conditioning)
    policy = ZeroPolicy(family, pool, OptimizerConfig(learning_rate=1e-2), family.config.lora)
    velocity = family.velocity(policy.engine, x, time, conditioning)
    policy.backward((velocity - x).square().mean(), last=True)
    with torch.no_grad():
        after = family.velocity(policy.engine, x, time, conditioning)
    return {
        "before": float((velocity.detach() - expected).abs().max()),
        "after": float((after - expected).abs().max()),
        "grad_norm": policy.grad_norm(),
        "trained": len(policy.parameters),
    }


def main() -> None:
    torch.set_num_threads(1)
    quiet_deepspeed()
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    # DeepSpeed collects garbage for every engine, among all that the libraries have made.
    gc.freeze()
    orders = json.loads(Path(sys.argv[1]).read_text())
    seen = {name: step(order["model"], checkpointing=order["checkpointing"]) for name, order in orders.items()}
    Path(sys.argv[2]).write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


main()
