"""The two models of a comparison, drawn with the same noise and scored by the same rewards."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from euphonium.config import RunConfig
from euphonium.errors import ConfigError
from euphonium.files import written_aside
from euphonium.generators.folder import index_name, may_be_hub_id
from euphonium.wire.records import Array, OrmAnswer
from orchestrator.generation.clips import ClipFormat, Frames, save_clip
from orchestrator.generation.policies import check_prompts_of, open_checkpoint, open_policy
from orchestrator.generation.scoring import Asked, Scorer
from orchestrator.report.bootstrap import grouped_interval
from orchestrator.report.pictures import contact_sheet
from orchestrator.state.checkpoints import Checkpoint

BASE = "base"
SIDES = ("a", "b")
RESULT = "comparison.json"
MOST_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of the two models.

    Attributes:
        name: what the user called it.
        checkpoint: of the run whose settings it is drawn with.
        config: those settings, with the model's own path.
        base: whether it is the generator at that path as it is, not the checkpoint's policy.
    """

    name: str
    checkpoint: Checkpoint
    config: RunConfig
    base: bool


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two clips of the same prompt from the same noise.

    Attributes:
        prompt: the prompt.
        seed: seed of the noise.
        files: the clips, of ``a`` and of ``b``.
    """

    prompt: str
    seed: int
    files: tuple[Path, Path]


def find_contenders(names: Sequence[str], asked: Asked) -> tuple[list[Contender], list[str], list[int]]:
    """Opens what two names stand for.

    Args:
        names: folders of runs, checkpoints or pipelines, hub ids, or ``base`` for the generator that the other one's
            run began with. The first run or checkpoint among them says which prompts, rewards and settings are taken.
        asked: what differs from that run's evaluation.

    Returns:
        The contenders, the prompts and the seeds.

    Raises:
        ConfigError: neither is a run, or they cannot start from the same noise.
        CheckpointError: there is no undamaged checkpoint.
    """
    pipelines = {name for name in names if name == BASE or index_name(Path(name)) is not None or may_be_hub_id(name)}
    runs = {name: open_checkpoint(Path(name)) for name in names if name not in pipelines}
    if not runs:
        raise ConfigError(
            f"{names[0]} and {names[1]} are no runs: one of the two has to be a run or checkpoint, whose recipe has "
            "the prompts and rewards"
        )
    checkpoint, config = next(iter(runs.values()))
    config, prompts, seeds = asked.of(config)
    found = []
    for name in names:
        if name in runs:
            own, settings = runs[name]
            same = {"evaluation": config.evaluation, "model": _with_size_of(config, settings)}
            found.append(Contender(name, own, settings.model_copy(update=same), base=False))
        else:
            path = config.model.path if name == BASE else name
            model = config.model.model_copy(update={"path": path, "lora": None})
            found.append(Contender(name, checkpoint, config.model_copy(update={"model": model}), base=True))
    _refuse_other_latents(found)
    for contender in found:
        check_prompts_of(contender.config, prompts)
    return found, prompts, seeds


def _with_size_of(config: RunConfig, other: RunConfig) -> Any:
    size = {field: getattr(config.model, field) for field in ("height", "width", "frames")}
    return other.model.model_copy(update=size)


def _refuse_other_latents(contenders: Sequence[Contender]) -> None:
    from euphonium.generators.registry import open_generator

    one, other = (open_generator(contender.config.model) for contender in contenders)
    if one.latent_shape != other.latent_shape or one.fingerprint().get("vae") != other.fingerprint().get("vae"):
        raise ConfigError(
            f"{contenders[0].name} ({one.pipeline_class}, latents {list(one.latent_shape)}) and {contenders[1].name} "
            f"({other.pipeline_class}, {list(other.latent_shape)}) have no noise in common; compare models with the "
            "same VAE at the same size"
        )


def draw_both(
    contenders: Sequence[Contender], prompts: Sequence[str], seeds: Sequence[int], say: Callable[[str], None]
) -> list[Array]:
    """Latents of both, one loaded after the other."""
    drawn = []
    for contender in contenders:
        say(f"drawing {len(prompts)} samples of {contender.name}")
        policy = open_policy(contender.checkpoint, contender.config, base=contender.base)
        drawn.append(policy.sample(prompts, seeds))
        del policy
        gc.collect()
    return drawn


def save_pairs(
    folder: Path, latents: Sequence[Array], scorer: Scorer, form: ClipFormat, asked: tuple[Sequence[str], Sequence[int]]
) -> list[Pair]:
    """Writes the clips of both to ``a/`` and ``b/``, and the first ones side by side as a contact sheet."""
    prompts, seeds = asked
    pairs, rows = [], []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        clips: list[Frames] = [scorer.videos(side[i : i + 1])[0] for side in latents]
        kind = "png" if len(clips[0]) == 1 else form.kind
        files = [folder / side / f"{i:04d}.{kind}" for side in SIDES]
        for clip, file in zip(clips, files, strict=True):
            save_clip(clip, file, dataclasses.replace(form, kind=kind))
        pairs.append(Pair(str(prompt), seed, (files[0], files[1])))
        if i < MOST_ROWS:
            rows.append((str(prompt), list(zip(SIDES, clips, strict=True))))
    contact_sheet(rows).save(folder / "contact_sheet.png")
    return pairs


def differences(scores: Sequence[OrmAnswer], prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each reward that both have: means, mean difference ``b - a``, and how often ``b`` is better, with intervals.

    Samples of a prompt are drawn together in the bootstrap. Equal rewards count as half a win.
    """
    one, other = scores
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in one if name in other):
        gained = other[name].astype(np.float64) - one[name].astype(np.float64)
        found[name] = {
            "a": float(one[name].mean()),
            "b": float(other[name].mean()),
            "difference": dataclasses.asdict(grouped_interval(gained.tolist(), list(map(str, prompts)))),
            "b_better": dataclasses.asdict(
                grouped_interval(((np.sign(gained) + 1) / 2).tolist(), list(map(str, prompts)))
            ),
        }
    return found


def write_result(
    folder: Path,
    study: str,
    contenders: Sequence[Contender],
    pairs: Sequence[Pair],
    rewards: tuple[Sequence[OrmAnswer], Mapping[str, Any]],
) -> None:
    """Writes ``comparison.json``: the models, what was drawn, and every reward of every sample."""
    scores, compared = rewards
    config = contenders[0].config
    result = {
        "study": study,
        **{side: _described(contender) for side, contender in zip(SIDES, contenders, strict=True)},
        "steps": config.evaluation.num_steps,
        "size": {field: getattr(config.model, field) for field in ("height", "width", "frames")},
        "rewards": compared,
        "pairs": [
            {
                "prompt": pair.prompt,
                "seed": pair.seed,
                **{side: str(file.relative_to(folder)) for side, file in zip(SIDES, pair.files, strict=True)},
                "rewards": {
                    side: {name: float(values[i]) for name, values in own.items()}
                    for side, own in zip(SIDES, scores, strict=True)
                },
            }
            for i, pair in enumerate(pairs)
        ],
    }
    with written_aside(folder / RESULT) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")


def _described(contender: Contender) -> dict[str, str]:
    drawn = contender.config.model.path if contender.base else str(contender.checkpoint.folder)
    return {"name": contender.name, "model": drawn}
