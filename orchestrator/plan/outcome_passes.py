"""The passes of an outcome reward model in training, measured on the meta device."""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from typing import Any

import torch

from euphonium.config import OrmConfig
from orchestrator.plan.inputs import META
from orchestrator.plan.meter import Cost, measure
from orchestrator.plan.networks import Size, freed_gradients, gather_unit, size_of

# Prompts of the greatest length; which words they have does not matter.
WORD = "word "


class OutcomePasses:
    """The model of one recipe of ``train-orm``; its backbone has to be here, at least its configuration files."""

    def __init__(self, config: OrmConfig) -> None:
        """Reads the backbone's files, without weights.

        Raises:
            ConfigError: the backbone cannot be loaded.
        """
        from euphonium.rewards.outcome_model import OutcomeModel
        from learners.rewards.outcome import prepare

        self.config = config
        # The rotary tables and the head are not placed by transformers.
        self.model: Any = OutcomeModel.from_backbone(config.model, device_map="meta").to(META)
        self.dtype: torch.dtype = self.model.dtype
        prepare(self.model, config)

    @cached_property
    def size(self) -> Size:
        """Size of the model."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return dataclasses.replace(size_of(self.model), trained=trained, unit=gather_unit(self.model, blocks=False))

    def step(self, pairs: int) -> Cost:
        """Forward and backward pass of pairs of videos, in the type that the backbone computes in.

        Frames and text go through their halves of the backbone one after the other, as in the model itself, but frames
        are not put into their places in the text, which would need values.
        """
        model, videos = copy.deepcopy(self.model).to(self.dtype), 2 * pairs
        described = model.format
        frames = torch.zeros(described.frames, 3, described.size, described.size, dtype=torch.uint8)
        tokens = model.inputs([frames], [WORD * described.max_prompt_tokens], torch.device("cpu"))["input_ids"]
        pixels = torch.zeros(videos * described.frames, *frames.shape[1:], dtype=self.dtype, device=META)
        width = model.backbone.config.text_config.hidden_size
        words = torch.zeros(videos, tokens.shape[1], width, dtype=self.dtype, device=META)
        backbone = model.backbone.model

        def run() -> None:
            seen = backbone.get_image_features(pixel_values=pixels)
            parts = getattr(seen, "pooler_output", seen)
            text = words + sum(part.sum() for part in (parts if isinstance(parts, list | tuple) else [parts]))
            hidden = backbone.language_model(inputs_embeds=text, use_cache=False).last_hidden_state
            model.head(hidden[:, -1]).sum().backward()

        trained = [p for p in model.parameters() if p.requires_grad]
        with freed_gradients(trained):
            return measure(run, [*model.parameters(), *model.buffers()])
