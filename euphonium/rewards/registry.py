"""Outcome rewards by name: the built-in ones, and any ``package.module:Class``.

If a class has a nested ``Options(Node)``, the recipe's ``options`` are validated as one, like the rest of the recipe,
and passed to the constructor; a class without gets them as keyword arguments.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from pydantic import ValidationError

from euphonium.config import Node, OutcomeRewardConfig
from euphonium.config.explain import explain, mistakes
from euphonium.errors import ConfigError
from euphonium.rewards.base import OutcomeReward
from euphonium.rewards.shared import Analyser, SharedReward

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
    "hpsv3": "euphonium.rewards.hpsv3:HpsV3",
    "image_reward": "euphonium.rewards.image_reward:ImageReward",
    "geneval": "euphonium.rewards.geneval:GenEvalReward",
    "ocr": "euphonium.rewards.ocr:OcrReward",
    "optical_flow": "euphonium.rewards.optical_flow:OpticalFlowReward",
    "trained": "euphonium.rewards.outcome_model:TrainedOutcomeReward",
    "vlm_judge": "euphonium.rewards.vlm_judge:VlmJudge",
    "vlm_checklist": "euphonium.rewards.vlm_checklist:VlmChecklist",
    "http": "euphonium.rewards.http:HttpReward",
}


# Analysers of a recipe by class and options.
Analysers = dict[tuple[type[Analyser[object]], Node], Analyser[object]]


def find_reward(config: OutcomeRewardConfig) -> Callable[..., object]:
    """The class, or other callable, that ``type`` names; it constructs the reward.

    Raises:
        ConfigError: an unknown name, or a class that cannot be imported.

    Example:
        >>> find_reward(OutcomeRewardConfig(name="motion", type="sprite_motion")).__name__
        'MotionReward'
        >>> find_reward(OutcomeRewardConfig(name="own", type="collections:OrderedDict")).__name__
        'OrderedDict'
        >>> try:
        ...     find_reward(OutcomeRewardConfig(name="motion", type="sprite_motoin"))
        ... except ConfigError as error:
        ...     print(str(error).partition(" Your")[0])
        rewards.outcome (motion).type: unknown reward 'sprite_motoin'; did you mean 'sprite_motion'?
    """
    path = BUILT_IN.get(config.type, config.type)
    module_name, separator, class_name = path.partition(":")
    field = f"rewards.outcome ({config.name}).type"
    if not separator:
        near = difflib.get_close_matches(config.type, BUILT_IN, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"built-in are {', '.join(BUILT_IN)}."
        raise ConfigError(f"{field}: unknown reward {config.type!r}; {advice} Your own go by package.module:Class")
    try:
        found: Callable[..., object] = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{field}: cannot import {path!r}: {error}") from error
    return found


def options_of(made_by: Callable[..., object]) -> type[Node] | None:
    """The options that a reward's class declares; None for a class that takes keyword arguments."""
    options = getattr(made_by, "Options", None)
    return options if isinstance(options, type) and issubclass(options, Node) else None


def build_reward(config: OutcomeRewardConfig) -> OutcomeReward:
    """Constructs one reward.

    Raises:
        ConfigError: the reward cannot be constructed; names it and the option.
    """
    return _build(config, {})


def build_rewards(configs: Sequence[OutcomeRewardConfig]) -> dict[str, OutcomeReward]:
    """Constructs all rewards of a recipe, by name; rewards that read the same analysis share its analyser.

    Raises:
        ConfigError: a class is not found or is no reward, or it does not accept its options; names the reward and the
            option.
    """
    analysers: Analysers = {}
    return {config.name: _build(config, analysers) for config in configs}


def _build(config: OutcomeRewardConfig, analysers: Analysers) -> OutcomeReward:
    made_by = find_reward(config)
    path, field = BUILT_IN.get(config.type, config.type), f"rewards.outcome ({config.name})"
    try:
        made = _made(made_by, config.options, analysers)
    except ConfigError as error:
        raise ConfigError(f"{field}.options: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}.type: cannot construct {path!r} with options {config.options}: {error}") from error
    if not isinstance(made, OutcomeReward):
        raise ConfigError(f"{field}.type: {path!r} has no method score(videos, prompts)")
    return made


def _made(made_by: Callable[..., object], given: Mapping[str, object], analysers: Analysers) -> object:
    kind = options_of(made_by)
    if kind is None:
        return made_by(**given)
    try:
        options = kind.model_validate(given)
    except ValidationError as error:
        found = mistakes(error.errors(), given)
        raise ConfigError("; ".join(explain(kind, mistake, "options") for mistake in found)) from None
    analyser_class = made_by.analyser_class if _shares(made_by) else None
    return made_by(options, _analyser(analyser_class, options, analysers)) if analyser_class else made_by(options)


def _shares(made_by: Callable[..., object]) -> TypeGuard[type[SharedReward[object]]]:
    return isinstance(made_by, type) and issubclass(made_by, SharedReward)


def _analyser(kind: type[Analyser[object]], options: Node, analysers: Analysers) -> Analyser[object]:
    """The analyser for a reward's options, shared with other rewards that have the same ones."""
    own = kind.Options.model_validate({name: getattr(options, name) for name in kind.Options.model_fields})
    if (kind, own) not in analysers:
        analysers[kind, own] = kind(own)
    return analysers[kind, own]
