"""Low-rank adapters of a transformer, the same in rollout actors and learners: adding, initialising, merging."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from euphonium.config import LoraConfig
from euphonium.errors import ConfigError

ADAPTER = "policy"


def add_adapter(transformer: nn.Module, config: LoraConfig, name: str = ADAPTER) -> None:
    """Adds a low-rank adapter to a transformer, and freezes everything else.

    Raises:
        ConfigError: peft is not installed, or ``model.lora.targets`` do not fit (:func:`check_targets`).
    """
    try:
        from peft import LoraConfig as PeftConfig
    except ImportError as error:
        raise ConfigError("model.lora needs peft: pip install 'euphonium[lora]'") from error
    check_targets(transformer, config)
    transformer.requires_grad_(False)
    transformer.add_adapter(  # type: ignore[operator]
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.targets),
            init_lora_weights=True,
            exclude_modules=getattr(transformer, "untrained_modules", None),
        ),
        adapter_name=name,
    )


def check_targets(transformer: nn.Module, config: LoraConfig) -> None:
    """Checks that each of ``model.lora.targets`` ends the names of linear layers, and of nothing else.

    Args:
        transformer: the transformer, which may be on the meta device.
        config: the adapter's settings.

    Raises:
        ConfigError: a target that would be left out without a word, or that no adapter can be put on.
    """
    # A layer that already carries an adapter is a wrapper around its linear layer.
    modules = {n.removesuffix(".base_layer"): m for n, m in transformer.named_modules()}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for target in config.targets:
        meant = [name for name in modules if _ends(name, target)]
        others = [name for name in meant if not isinstance(modules[name], nn.Linear)]
        if meant and not others:
            continue
        reason = "no linear layer's name ends in it"
        if others:
            reason = f"{others[0]} is no linear layer, but a {type(modules[others[0]]).__name__}"
        near = difflib.get_close_matches(target, _endings(linear), n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise ConfigError(f"model.lora.targets: {target!r}: {reason}; {advice}")


def _endings(names: list[str]) -> list[str]:
    """All endings of dotted names that begin with a word: ``to_out.0`` and ``attn.to_out.0``, but not ``0``."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(part[i:]) for part in parts for i in range(len(part)) if not part[i].isdigit()})


def adapter_parameters(transformer: nn.Module, name: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Parameters of an adapter by name."""
    return {n: p for n, p in transformer.named_parameters() if f".{name}." in n and ".lora_" in n}


def initial_adapter(parameters: dict[str, torch.Size], seed: int = 0) -> dict[str, Tensor]:
    """Initial values of an adapter: noise in the first factors, zeros in the second, so that it changes nothing.

    They depend on the seed alone, so all ranks make the same ones; peft's own initialisation does not reach
    partitioned parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in parameters.items():
        if ".lora_B." in name:
            values[name] = torch.zeros(shape)
        else:
            values[name] = torch.randn(shape, generator=generator) / shape[0]
    return values


def merged_state(transformer: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a transformer with its adapter merged into the weights, under the names of the plain transformer.

    Args:
        transformer: a transformer with an adapter of :func:`add_adapter`, which is removed.
        values: values of the adapter's parameters by name.
    """
    load_adapter(transformer, values)
    transformer.fuse_lora(adapter_names=[ADAPTER])  # type: ignore[operator]
    transformer.unload_lora()  # type: ignore[operator]
    return dict(transformer.state_dict())


@torch.no_grad()
def load_adapter(transformer: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies values into an adapter that :func:`add_adapter` made.

    Raises:
        KeyError: a parameter of the adapter has no value.
    """
    for name, parameter in adapter_parameters(transformer).items():
        parameter.copy_(values[name])


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
