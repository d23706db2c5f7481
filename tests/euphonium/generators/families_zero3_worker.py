"""One rank of ZeRO-3 that takes one optimiser step with each given generator; writes what it saw as JSON."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.rollout import encode_one
from euphonium.config import LearnerPoolConfig, ModelConfig, OptimizerConfig
from euphonium.generators.conditioning import Conditioning
from euphonium.generators.generator import Generator
from euphonium.generators.lora import adapter_parameters, add_adapter, initial_adapter, load_adapter
from euphonium.generators.registry import open_generator
from learners.engine.partitioned import ZeroPolicy
from learners.engine.zero3 import quiet_deepspeed
from learners.policy.start import start_weights

PROMPT = "a red car"
CPU = torch.device("cpu")


def plain_grad_norm(
    family: Generator, transformer: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning
) -> float:
    """Norm of the toy loss's gradient by plain autograd, on an unpartitioned transformer."""
    trained = dict(transformer.named_parameters())
    if family.config.lora is not None:
        add_adapter(transformer, family.config.lora)
        trained = adapter_parameters(transformer)
        load_adapter(transformer, initial_adapter({name: p.shape for name, p in trained.items()}))
    for p in trained.values():
        p.requires_grad_(True)
    loss = (family.velocity(transformer.train(), x, time, conditioning) - x).square().mean()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return float(torch.stack([g.float().norm() for g in gradients if g is not None]).norm())


def step(model: dict[str, Any], *, checkpointing: bool, start: str | None = None) -> dict[str, float]:
    """How far the partitioned policy is from a rollout actor's, before and after a step on a toy loss.

    Args:
        model: the recipe's section.
        checkpointing: whether activations are recomputed.
        start: checkpoint of all weights that both start from.
    """
    family = open_generator(ModelConfig.model_validate(model))
    pool = LearnerPoolConfig(gradient_checkpointing=checkpointing, persistence_threshold=0)
    conditioning = encode_one(family.prompt_encoder(CPU, {PROMPT: family.folder.parent / "first_frame.png"}), PROMPT)
    x, time = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    rollout = family.load_transformer(CPU)
    weights = None if start is None else start_weights(Path(start), family)
    if weights is not None:
        rollout.load_state_dict(weights)
    with torch.no_grad():
        expected = family.velocity(rollout, x, time, conditioning)
    plain = plain_grad_norm(family, rollout, x, time, conditioning)
    policy = ZeroPolicy(family, pool, OptimizerConfig(learning_rate=1e-2), family.config.lora, start=weights)
    velocity = family.velocity(policy.model, x, time, conditioning)
    policy.backward((velocity - x).square().mean(), last=True)
    with torch.no_grad():
        after = family.velocity(policy.model, x, time, conditioning)
    return {
        "before": float((velocity.detach() - expected).abs().max()),
        "after": float((after - expected).abs().max()),
        "grad_norm": policy.grad_norm(),
        "plain_grad_norm": plain,
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
    seen = {name: step(**order) for name, order in orders.items()}
    Path(sys.argv[2]).write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


main()
