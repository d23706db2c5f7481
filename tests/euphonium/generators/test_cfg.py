"""Classifier-free guidance in one pass: numbers and gradients of two passes, and one block's gradients at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor, nn

from euphonium.generators.attention import HunyuanAttention, Run, Runs
from euphonium.generators.backbone import block_classes
from euphonium.generators.conditioning import Conditioning, expand, negative, positive
from euphonium.generators.generator import Generator
from tests.euphonium.generators.cases import CASES, CPU, PROMPTS, conditioning_of, family_of, noise
from tests.euphonium.generators.tiny_pipelines import Folders

GUIDED = [name for name, case in CASES.items() if case.cfg_scale is not None]
TIME = torch.tensor([0.3, 0.95])


def two_passes(family: Generator, network: nn.Module, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
    """Guidance as its definition says it."""
    outputs = [family.network(network, x, time, side(conditioning)) for side in (positive, negative)]
    assert family.config.cfg_scale is not None
    return family.guide(*outputs, family.guidance_scale(time))


def gradients(output: Tensor, x: Tensor, network: nn.Module) -> dict[str, Tensor]:
    """Gradients of a toy loss, of the parameters that it has."""
    named = dict(network.named_parameters())
    found = torch.autograd.grad((output - x).square().sum(), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None and bool(g.any())}


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 2], ids=["two prompts", "a group of one"])
def test_one_pass_computes_what_two_do(name: str, prompts: list[str], folders: Folders) -> None:
    family = family_of(name, folders)
    network = family.load_transformer(CPU)
    x, conditioning = noise(family), conditioning_of(family, prompts)
    one = family.velocity(network, x, TIME, conditioning)
    two = two_passes(family, network, x, TIME, conditioning)
    torch.testing.assert_close(one, two, atol=3e-5, rtol=1e-5)
    ours, theirs = (gradients(output, x, network) for output in (one, two))
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    # Some gradients are but rounding: a key's bias changes no softmax.
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, atol=1e-6 * largest, rtol=1e-3, msg=parameter)


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_blocks_gradients_are_there_before_the_next_ones(name: str, passes: int, folders: Folders) -> None:
    """What hands gradients on as they come, as ZeRO does, then holds one block's; after two passes, all blocks'."""
    family = family_of(name, folders)
    network = family.load_transformer(CPU)
    blocks = [module for module in network.modules() if type(module).__name__ in block_classes(network)]
    assert len(blocks) > 1
    events: list[str] = []
    for parameter in blocks[-1].parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient of the last block"))
    blocks[0].register_full_backward_pre_hook(lambda *_: events.append("first block"))
    velocity = family.velocity if passes == 1 else partial(two_passes, family)
    x, conditioning = noise(family), conditioning_of(family)
    (velocity(network, x, TIME, conditioning) - x).square().sum().backward()
    assert len(events) > 2
    after = events[events.index("first block") :]
    assert ("gradient of the last block" in after) == (passes == 2)


@pytest.mark.parametrize("name", ["hunyuan with true CFG", "hunyuan 1.5", "skyreels"])
def test_prompts_of_different_lengths_attend_without_a_mask(
    name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    from euphonium.generators import attention

    family = family_of(name, folders)
    conditioning = conditioning_of(family, PROMPTS[:1])
    lengths = {side(conditioning)["encoder_hidden_states"].shape[1] for side in (positive, negative)}
    assert len(lengths) == 2
    tokens: set[int] = set()
    attend = attention.dispatch_attention_fn

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: object) -> Tensor:
        assert attn_mask is None
        tokens.add(query.shape[1])
        return attend(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(attention, "dispatch_attention_fn", watched)
    with torch.no_grad():
        family.velocity(family.load_transformer(CPU), noise(family, 3), torch.full((3,), 0.5), expand(conditioning, 3))
    assert len(tokens) == 2
    assert max(tokens) - min(tokens) == max(lengths) - min(lengths)


def test_runs_of_a_mask() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    # One token of the latents and three of the prompts; the last prompts of both batches have all of them.
    assert Runs()(mask, 3) == [Run(2, 2), Run(1, 0), Run(1, 3)]
    assert Runs()(mask[:, None, None], 3) == Runs()(mask, 3)
    assert Runs()(torch.tensor([[1, 0, 1]]), 2) is None
    assert Runs()(torch.tensor([[0, 1, 1]]), 2) is None
    assert Runs()(torch.zeros(5, 3, device="meta"), 2) == [Run(5, 2)]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("hunyuan", HunyuanVideoAttnProcessor2_0), ("hunyuan 1.5", HunyuanVideo15AttnProcessor2_0)],
)
@pytest.mark.parametrize(
    "rows", [[[1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 0, 0]], [[1, 0, 1], [1, 1, 1]]], ids=["full", "cut", "with holes"]
)
def test_attention_without_masks_equals_the_masked_one(
    name: str, theirs: type[HunyuanVideoAttnProcessor2_0], rows: list[list[int]], folders: Folders
) -> None:
    network = family_of(name, folders).load_transformer(CPU)
    layers = [m for m in network.modules() if isinstance(getattr(m, "processor", None), HunyuanAttention)]
    assert len(layers) > 1
    seen = torch.tensor(rows, dtype=torch.bool)
    mask = seen if name == "hunyuan 1.5" else torch.cat([torch.ones(2, 6, dtype=torch.bool), seen], 1)[:, None, None]
    draw = torch.Generator().manual_seed(0)
    for layer in layers:
        width = layer.to_q.in_features
        latents, text = (torch.randn(2, n, width, generator=draw) for n in (6, 3))
        half = torch.rand(6, layer.to_q.out_features // layer.heads // 2, generator=draw).repeat_interleave(2, 1)
        inputs = (layer, latents, text, mask, (half.cos(), half.sin()))
        with torch.no_grad():
            ours, expected = HunyuanAttention(Runs())(*inputs), theirs()(*inputs)
        torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1][seen], expected[1][seen], atol=1e-5, rtol=1e-5)
