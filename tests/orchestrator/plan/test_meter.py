"""Living memory and operations of computations whose numbers are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from orchestrator.plan.meter import measure

FLOAT = 4
META = torch.device("meta")


def test_what_is_released_is_not_counted_twice() -> None:
    x = torch.zeros(1000, device=META)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(10):
            y = y + 1
        return y

    cost = measure(chain, [x])
    # The sum that is being made, and the one that it is made of.
    assert cost.peak_bytes == 2 * 1000 * FLOAT
    assert cost.flops == 0


def test_views_share_their_storage() -> None:
    x = torch.zeros(10, 100, device=META)
    assert measure(lambda: [(x + 1).view(100, 10).transpose(0, 1) for _ in range(3)]).peak_bytes == 3 * 1000 * FLOAT


def test_products_count_two_operations_a_pair() -> None:
    layer = nn.Linear(20, 30, bias=False, device=META)
    x = torch.zeros(7, 20, device=META)
    assert measure(lambda: layer(x)).matmul_flops == 2 * 7 * 20 * 30
    # Backward: one product for the weights; the input needs no gradient.
    assert measure(lambda: layer(x).sum().backward()).matmul_flops == 2 * 2 * 7 * 20 * 30


def test_convolutions_are_counted_apart() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1, device=META)
    cost = measure(lambda: layer(torch.zeros(1, 3, 16, 16, device=META)))
    assert (cost.matmul_flops, cost.conv_flops) == (0, 2 * 16 * 16 * 8 * 3 * 9)


def test_convolutions_copy_what_they_take_and_make() -> None:
    layer = nn.Conv2d(4, 8, 1, device=META)
    cost = measure(lambda: layer(torch.zeros(2, 4, 16, 16, device=META)), layer.parameters())
    taken, made = 2 * 4 * 16 * 16 * FLOAT, 2 * 8 * 16 * 16 * FLOAT
    assert (cost.peak_bytes, cost.workspace_bytes) == (taken + made, taken + made)


def test_of_more_than_convolutions_can_count_they_copy_a_part() -> None:
    layer = nn.Conv2d(1, 1, 1, device=META)
    each = (1 << 29) - 1
    cost = measure(lambda: layer(torch.zeros(5, 1, 1, each, device=META)), layer.parameters())
    assert cost.workspace_bytes == 2 * each * FLOAT


@pytest.mark.parametrize("training", [False, True])
def test_attention_is_a_fused_kernel(training: bool) -> None:
    query, key, value = (torch.zeros(1, 2, length, 16, device=META) for length in (512, 256, 256))
    query.requires_grad_(training)

    def attend() -> None:
        out = functional.scaled_dot_product_attention(query, key, value)
        if training:
            out.sum().backward()

    cost = measure(attend, [query, key, value])
    forward = 2 * 2 * 2 * 512 * 256 * 16
    assert cost.matmul_flops == forward * (3.5 if training else 1)
    # No matrix of scores: 2 * 512 * 256 * 4 bytes.
    assert cost.peak_bytes < 2 * 512 * 256 * FLOAT


def test_checkpoints_are_computed_again_and_save_memory() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(8)])
    layers.to(META)
    x = torch.zeros(1000, 64, device=META, requires_grad=True)

    def through(saving: bool) -> None:
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if saving else layer(y)
        y.sum().backward()

    plain, saving = measure(lambda: through(False)), measure(lambda: through(True))
    assert saving.peak_bytes < 0.6 * plain.peak_bytes
    # Of two layers the first is computed again; of the second only the input is needed.
    assert saving.matmul_flops == pytest.approx(plain.matmul_flops * 7 / 6)


def test_masks_of_trimmed_prompts_select_everything() -> None:
    x, mask = torch.zeros(5, 3, device=META), torch.ones(5, device=META).bool()
    shapes = []
    measure(lambda: shapes.extend([x[mask].shape, x[~mask].shape, bool(mask.all())]))
    assert shapes == [(5, 3), (0, 3), True]
