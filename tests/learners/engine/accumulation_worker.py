"""One rank whose every micro-batch has the gradient 1; prints the gradient norm of the update."""

import sys

import torch
from torch import nn

from euphonium.config import LearnerPoolConfig, OptimizerConfig
from learners.engine.options import training_options
from learners.engine.zero3 import ZeroEngine, join_group


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return (self.weight * factor).sum()


def main() -> None:
    join_group(0)
    settings = OptimizerConfig(learning_rate=1e-3)
    options = training_options(LearnerPoolConfig(), settings, torch.bfloat16, whole_below=0)
    engine = ZeroEngine(Sum(), settings, options, averages=False)
    count = int(sys.argv[1])
    for i in range(count):
        engine.backward(engine.model(torch.ones(1, dtype=torch.bfloat16)), last=i == count - 1)
    sys.stdout.write(f"norm {engine.grad_norm()}\n")
    torch.distributed.destroy_process_group()


main()
