"""``euphonium evaluate``: scores a checkpoint, or the generator before training, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands.arguments import (
    FramesOption,
    HeightOption,
    NoiseSeedOption,
    PromptFileOption,
    PromptsOption,
    ProtocolOption,
    RunArgument,
    SamplesOption,
    StepsOption,
    WidthOption,
    given,
)

if TYPE_CHECKING:
    from orchestrator.generation.policies import Protocol
    from orchestrator.generation.scoring import Asked


def evaluate(
    model: RunArgument,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the generator before training instead.")] = False,
    prompt_file: PromptFileOption = None,
    prompts: PromptsOption = None,
    samples_per_prompt: SamplesOption = None,
    seed: NoiseSeedOption = None,
    steps: StepsOption = None,
    protocol: ProtocolOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
) -> None:
    """Score a checkpoint on held-out prompts: ODE samples and outcome rewards."""
    from orchestrator.commands.cli import say
    from orchestrator.generation.scoring import Asked

    asked = Asked(
        changes=given(prompts=prompts, samples_per_prompt=samples_per_prompt, seed=seed, num_steps=steps),
        size=given(height=height, width=width, frames=frames),
        files=prompt_file or (),
    )
    say(json.dumps(evaluate_model(model, asked, base=base, protocol=protocol), indent=2))


def evaluate_model(path: Path, asked: Asked, *, base: bool, protocol: Protocol | None = None) -> dict[str, Any]:
    """Scores a checkpoint, or the generator that its run started from.

    Args:
        path: checkpoint or run folder.
        asked: what differs from the run's own evaluation.
        base: score the generator before training.
        protocol: as for :func:`orchestrator.generation.policies.open_policy`.

    Returns:
        Mean and standard error of every reward and of their weighted mean.
    """
    from orchestrator.generation.policies import check_prompts_of, open_checkpoint, open_policy
    from orchestrator.generation.scoring import Scorer, mean_and_error

    checkpoint, config = open_checkpoint(path)
    config, prompts, seeds = asked.of(config)
    check_prompts_of(config, prompts)
    policy = open_policy(checkpoint, config, base=base, protocol=protocol)
    scorer = Scorer(config)
    scores = scorer.score(policy.sample(prompts, seeds), prompts)
    missing = scorer.missing(scores)
    return {
        "model": str(config.model.path) if base else str(checkpoint.folder),
        "protocol": protocol or "without reward gradient",
        "prompts": len(prompts),
        **({"missing": missing} if missing else {}),
        **{name: mean_and_error(values) for name, values in scores.items()},
    }
