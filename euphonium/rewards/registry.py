"""Outcome rewards by name: the built-in ones, and any ``package.module:Class``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.base import OutcomeReward

# Import paths, not classes: a server imports only the libraries of the rewards that it serves.
BUILT_IN: dict[str, str] = {
    "sprite_icon": "euphonium.embedded.rewards:IconReward",
    "sprite_motion": "euphonium.embedded.rewards:MotionReward",
    "sprite_background": "euphonium.embedded.rewards:BackgroundReward",
    "sprite_quality": "euphonium.embedded.rewards:QualityReward",
    "videoalign": "euphonium.rewards.videoalign:VideoAlignReward",
    "solireward": "euphonium.rewards.solireward:SoliReward",
    "clip_score": "euphonium.rewards.clip:ClipScore",
    "pickscore": "euphonium.rewards.clip:PickScore",
    "hps_v21": "euphonium.rewards.clip:HpsV21",
    "aesthetic": "euphonium.rewards.clip:AestheticReward",
    "ocr": "euphonium.rewards.ocr:OcrReward",
    "optical_flow": "euphonium.rewards.optical_flow:OpticalFlowReward",
    "trained": "euphonium.rewards.outcome_model:TrainedOutcomeReward",
    "http": "euphonium.rewards.http:HttpReward",
}


def find_reward(config: OutcomeRewardConfig) -> Callable[..., Any]:
    """What makes a reward of its options: the class that ``type`` names.

    Raises:
        ConfigError: an unknown name, or a class that cannot be imported.
    """
    path = BUILT_IN.get(config.type, config.type)
    module_name, separator, class_name = path.partition(":")
    field = f"rewards.outcome ({config.name}).type"
    if not separator:
        near = difflib.get_close_matches(config.type, BUILT_IN, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"built-in are {', '.join(BUILT_IN)}"
        raise ConfigError(f"{field}: unknown reward {config.type!r}; {advice} Your own go by package.module:Class")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{field}: cannot import {path!r}: {error}") from error
    return found


def build_reward(config: OutcomeRewardConfig) -> OutcomeReward:
    """Constructs a reward.

    Raises:
        ConfigError: see :func:`find_reward`; or options that the class does not take, or that it cannot be made with.
    """
    made_by = find_reward(config)
    path, field = BUILT_IN.get(config.type, config.type), f"rewards.outcome ({config.name}).type"
    try:
        made = made_by(**config.options)
    except ConfigError as error:
        raise ConfigError(f"rewards.outcome ({config.name}).options: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}: cannot construct {path!r} with options {config.options}: {error}") from error
    if not isinstance(made, OutcomeReward):
        raise ConfigError(f"{field}: {path!r} has no method score(videos, prompts)")
    return made
