"""Process reward model: the first blocks of the generator, a query attention and a small head (Euphonium, 4.2).

It scores noisy latents, ``r(x_sigma, sigma, c)``, at every noise level, and its gradient with respect to ``x`` guides
rollouts. It reads the generator's own latents and text embeddings, so it fits that generator only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import Conditioning, expand, positive
from euphonium.generators.generator import Generator
from euphonium.generators.registry import open_generator
from euphonium.weight_files import check_fit, one_line, shapes_of
from euphonium.wire.later import Later

CONFIG_FILE = "prm.json"
WEIGHTS_FILE = "model.safetensors"


class QueryAttention(nn.MultiheadAttention):
    """Attention of a few queries to many tokens.

    The projections of keys and values are applied to the queries and to what they pool, never to the tokens: the same
    numbers up to rounding, for a fraction of the operations where there are fewer queries than channels.
    """

    @override
    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Pools tokens ``[batch, tokens, width]`` by queries ``[queries, width]`` to ``[batch, queries, width]``."""
        to_query, to_key, to_value = self.in_proj_weight.unflatten(0, (3, self.num_heads, self.head_dim))
        # The keys' bias adds the same to all scores of a query.
        query_bias, _, value_bias = self.in_proj_bias.unflatten(0, (3, self.num_heads, self.head_dim))
        projected = torch.einsum("qw,hdw->hqd", queries, to_query) + query_bias[:, None]
        by_channel = torch.einsum("hqd,hdw->hqw", projected, to_key) / self.head_dim**0.5
        weights = (by_channel.flatten(0, 1) @ tokens.transpose(1, 2)).softmax(dim=-1)
        pooled = (weights @ tokens).unflatten(1, by_channel.shape[:2])
        values = torch.einsum("bhqw,hdw->bqhd", pooled, to_value) + value_bias
        attended: Tensor = self.out_proj(values.flatten(2))
        return attended


class QueryHead(nn.Module):
    """Pools tokens by attention with learned queries, then an MLP to one number; always in float32."""

    def __init__(self, width: int, queries: int = 4, hidden: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.attention = QueryAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(queries * width), nn.Linear(queries * width, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to ``[batch]``."""
        tokens = self.norm(tokens.float())
        pooled = self.attention(self.queries[0], tokens)
        scores: Tensor = self.mlp(pooled.flatten(1))
        return scores.squeeze(1)


class ProcessRewardModel(nn.Module):
    """``r(x_sigma, sigma, c)`` for the generators of one family."""

    def __init__(self, family: Generator, blocks: int, head: dict[str, int] | None = None) -> None:
        super().__init__()
        self.family = family
        self.blocks = blocks
        self.trunk = family.build_trunk(blocks)
        self.head_options = dict(head or {})
        self.head = QueryHead(family.token_width(), **self.head_options)

    @classmethod
    def from_generator(cls, family: Generator, blocks: int, head: dict[str, int] | None = None) -> ProcessRewardModel:
        """A new model, whose trunk starts from the generator's own first blocks."""
        model = cls(family, blocks, head)
        wanted = model.trunk.state_dict().keys()
        state = {}
        for file in family.transformer_files():
            with safe_open(file, framework="pt") as stream:
                for name in wanted & set(stream.keys()):
                    state[name] = stream.get_tensor(name)
        if missing := wanted - state.keys():
            raise ConfigError(
                f"model.path: the transformer of {family.folder} lacks {len(missing)} weights of its first {blocks} "
                f"blocks, for example {min(missing)}"
            )
        model.trunk.load_state_dict(state)
        return model

    def for_training(self, *, gradient_checkpointing: bool = False) -> ProcessRewardModel:
        """Makes all weights float32 and trainable; the trunk still computes in the generator's type.

        Raises:
            ConfigError: the transformer does not support gradient checkpointing.
        """
        self.float().train().requires_grad_(True)
        if gradient_checkpointing:
            if not getattr(self.trunk, "_supports_gradient_checkpointing", False):
                raise ConfigError(f"gradient_checkpointing: {type(self.trunk).__name__} has none; leave it off")
            self.trunk.enable_gradient_checkpointing()  # type: ignore[operator]
        return self

    def _computing(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocasts to the generator's type while float32 weights of a bfloat16 generator are trained."""
        weight = next(self.trunk.parameters())
        if weight.dtype == self.family.dtype:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.family.dtype)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Rewards ``[batch]`` (float32) of states ``[batch, *latent]`` at noise fractions ``[batch]``."""
        with _captured_input(self.family.output_norm(self.trunk)) as tokens, self._computing(x.device):
            self.family.network(self.trunk, x, sigma, positive(conditioning))
        scores: Tensor = self.head(self.family.sample_tokens(tokens[0]))
        return scores

    def reward_and_gradient(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Rewards ``[batch]`` and their gradients with respect to ``x``; parameters get no gradients.

        Samples do not interact, so the gradient of the batch's sum holds each sample's own.
        """
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            rewards = self(x, sigma, conditioning)
            (gradient,) = torch.autograd.grad(rewards.sum(), x)
        return rewards.detach(), gradient

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, **notes: object) -> None:
        """Writes the weights (safetensors), and a description as JSON.

        Args:
            folder: created if it does not exist.
            dtype: type of the weights on disk; :meth:`load` widens them.
            notes: further entries of the description.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        description = {
            "pipeline_class": self.family.pipeline_class,
            "blocks": self.blocks,
            "head": self.head_options,
            "generator": self.family.fingerprint(),
            **notes,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> ProcessRewardModel:
        """Reads a saved model for use with a generator.

        Raises:
            ConfigError: the folder holds no model, or one for latents or text embeddings of another generator.
        """
        # First without memory: a damaged description may be of a model that none holds.
        cls.check(folder, config)
        model = cls._described(folder, config)
        with _blaming(folder):
            model.load_state_dict({name: t.float() for name, t in load_file(folder / WEIGHTS_FILE).items()})
        return model.eval().requires_grad_(False)

    @classmethod
    def check(cls, folder: Path, config: ModelConfig) -> None:
        """Raises the errors of :meth:`load`, as far as they show without reading the weights."""
        with torch.device("meta"):
            model = cls._described(folder, config)
        with _blaming(folder):
            check_fit(shapes_of(folder / WEIGHTS_FILE), model)

    @classmethod
    def _described(cls, folder: Path, config: ModelConfig) -> ProcessRewardModel:
        """A model as the folder's description has it, with new weights."""
        description = _description(folder)
        family = open_generator(config)
        if description["pipeline_class"] != family.pipeline_class:
            raise ConfigError(
                f"rewards.process.path: {folder} was trained for a {description['pipeline_class']}, and "
                f"{family.folder} is a {family.pipeline_class}: train one for this generator with `euphonium train-prm`"
            )
        for part, mark in family.fingerprint().items():
            if description["generator"].get(part) != mark:
                raise ConfigError(
                    f"rewards.process.path: {folder} was trained with another {part} than {family.folder} has; a "
                    "process reward model works only with its own generator's latents and text embeddings: train one "
                    "for this generator with `euphonium train-prm`"
                )
        with _blaming(folder):
            return cls(family, description["blocks"], description["head"])


def _description(folder: Path) -> dict[str, Any]:
    """The description of a saved model.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"rewards.process.path: {folder} holds no process reward model ({CONFIG_FILE} is missing); give the folder "
            "that `euphonium train-prm` wrote"
        )
    kinds = {"pipeline_class": str, "blocks": int, "head": dict, "generator": dict}
    with _blaming(folder):
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{CONFIG_FILE} holds no JSON object")
        for name, kind in kinds.items():
            if not isinstance(found.get(name), kind):
                raise ValueError(f"{CONFIG_FILE} has no entry {name!r} of the type {kind.__name__}")
    return found


@contextmanager
def _blaming(folder: Path) -> Iterator[None]:
    """Names the folder, and what to do, in errors about the files of a saved model."""
    try:
        yield
    except ConfigError:
        raise
    except (ArithmeticError, AssertionError, OSError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"rewards.process.path: the process reward model in {folder} cannot be used: {one_line(error)}; copy it "
            "again from where `euphonium train-prm` wrote it, or train one for this generator"
        ) from error


class LocalRewards:
    """A process reward model in this process, for one prompt: a source of rewards and gradients without a server."""

    def __init__(self, model: ProcessRewardModel, conditioning: Conditioning, sigmas: Tensor) -> None:
        """Creates a source; nothing is computed.

        Args:
            model: the process reward model.
            conditioning: conditioning of the prompt, with a leading dimension of 1.
            sigmas: noise levels of the states of a trajectory, ``[num_steps + 1]``.
        """
        self._model = model
        self._conditioning = conditioning
        self._sigmas = sigmas

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[tuple[Tensor, Tensor | None]]:
        """Scores states ``[batch, *latent]`` of step k immediately: rewards ``[batch]``, and the gradient or None."""
        sigmas = torch.full((len(x),), float(self._sigmas[k]), device=x.device)
        prompt = expand(self._conditioning, len(x))
        answer: tuple[Tensor, Tensor | None]
        if with_gradient:
            answer = self._model.reward_and_gradient(x, sigmas, prompt)
        else:
            with torch.no_grad():
                answer = self._model(x, sigmas, prompt), None
        return Later(lambda: answer)


@contextmanager
def _captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the first argument of every call of a module while the context is open."""
    captured: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0]))
    try:
        yield captured
    finally:
        handle.remove()
