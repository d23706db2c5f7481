"""What draws clips: the policy of a run or checkpoint, or a diffusers pipeline, with or without an adapter."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from euphonium.config import ModelConfig, RunConfig, load_config
from euphonium.errors import ConfigError
from euphonium.generators.components import load_pipeline
from euphonium.generators.folder import INDEX, PipelineFolder, index_name, may_be_hub_id
from euphonium.generators.pictures import open_picture, require_pictures
from euphonium.generators.prompt_length import warn_of_cut_prompts
from euphonium.generators.registry import FAMILIES, adapter_of
from euphonium.generators.sample_size import SampleSize, read_sample_size
from euphonium.generators.sound import Sound
from euphonium.weight_files import one_line
from euphonium.wire.devices import local_device
from orchestrator.generation.clips import Clip, Frames
from orchestrator.generation.policies import Protocol as Sampling
from orchestrator.generation.policies import (
    TrainedPolicy,
    check_prompts_of,
    checked_size,
    open_checkpoint,
    open_policy,
    resized,
)
from orchestrator.generation.samples import Sample
from orchestrator.state.checkpoints import RESOLVED, Checkpoint

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# A pipeline is found without knowing the size of its samples; this one suits all of them.
SIDE = 512
# Arguments of a pipeline's call that are its samples' size.
SIZES = ("height", "width", "num_frames")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How clips are drawn.

    Attributes:
        steps: number of ODE steps.
        protocol: as for :func:`orchestrator.generation.policies.open_policy`; None for the one that fits.
        size: height, width and frames, as far as they differ from the model's own.
        base: draw with the generator before training; of runs and checkpoints.
        adapter: folder of a low-rank adapter that is loaded into a pipeline.
        dtype: type of a pipeline's weights; a run has its own.
        guidance_scale: passed to a pipeline; a run has its own.
    """

    steps: int
    protocol: Sampling | None = None
    size: SampleSize = field(default_factory=dict)
    base: bool = False
    adapter: Path | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    guidance_scale: float | None = None


class Model(Protocol):
    """Draws clips."""

    def draw(self, samples: Sequence[Sample]) -> list[Clip]:
        """Clips, one a sample, drawn in one pass."""
        ...


class ModelSource(Protocol):
    """A model that is found but not loaded yet; can be sent to a task on another node."""

    @property
    def drawing(self) -> Drawing:
        """How it is to draw."""
        ...

    @property
    def stills(self) -> bool:
        """Whether it makes images."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What tells its clips from those of another model."""
        ...

    def check(self, samples: Sequence[Sample]) -> None:
        """Checks that it can draw these samples; raises ConfigError if not."""
        ...

    def load(self) -> Model:
        """Loads it onto this process's GPU, if it has one."""
        ...


def find_model(model: str, drawing: Drawing, prompts: Path) -> ModelSource:
    """Finds a model, and checks that it can draw so; a hub id is downloaded.

    Args:
        model: folder of a run, a checkpoint or a diffusers pipeline, or a hub id.
        drawing: how it is to draw.
        prompts: where the prompts with pictures will be, as a ``.jsonl`` file.

    Raises:
        ConfigError: there is no such model, or it cannot draw so.
        CheckpointError: there is no undamaged checkpoint.
    """
    path = Path(model)
    if may_be_hub_id(model) or index_name(path) is not None:
        return PipelineSource(model, _found(model), drawing)
    own: list[tuple[str, object]] = [
        ("--adapter", drawing.adapter), ("--dtype", drawing.dtype), ("--guidance-scale", drawing.guidance_scale)
    ]  # fmt: skip
    for option, value in own:
        if value is not None:
            raise ConfigError(f"{option}: {model} is a run, which has its own; give the folder of a pipeline, or leave "
                              "it out")  # fmt: skip
    checkpoint, config = open_checkpoint(path)
    evaluation = config.evaluation.model_copy(update={"num_steps": drawing.steps})
    config = config.model_copy(update={"evaluation": evaluation, "model": resized(config.model, drawing.size)})
    return RunSource(checkpoint, config, drawing, prompts)


def _found(model: str) -> PipelineFolder:
    return PipelineFolder.find(ModelConfig(path=model, height=SIDE, width=SIDE))


@dataclass(frozen=True)
class RunSource:
    """The policy of a checkpoint."""

    checkpoint: Checkpoint
    config: RunConfig
    drawing: Drawing
    prompts: Path

    @property
    def stills(self) -> bool:
        """Whether it makes images."""
        return self.config.model.frames == 1

    def identity(self) -> dict[str, str]:
        """The checkpoint, or the generator that its run began with."""
        return {"model": self.config.model.path if self.drawing.base else str(self.checkpoint.folder.resolve())}

    def check(self, samples: Sequence[Sample]) -> None:
        """Checks prompts, pictures and settings; warns of prompts that are cut."""
        from euphonium.generators.generator import images_for
        from euphonium.generators.registry import open_generator

        generator = open_generator(self.config.model)
        texts = [sample.prompt for sample in samples]
        if generator.takes_image:
            images = {sample.prompt: sample.image for sample in samples if sample.image is not None}
            known = images or images_for(generator, self.config.prompts)
            require_pictures(generator, dict.fromkeys(texts), known, "--prompt-file")
        check_prompts_of(self.config, texts)

    def load(self) -> Model:
        """The policy, loaded."""
        config = self.config
        if self.prompts.is_file():
            named = config.prompts.model_copy(update={"train": self.prompts, "evaluation": self.prompts})
            config = config.model_copy(update={"prompts": named})
        policy = open_policy(self.checkpoint, config, base=self.drawing.base, protocol=self.drawing.protocol)
        return RunModel(policy)


class RunModel:
    """A loaded policy, with its decoder."""

    def __init__(self, policy: TrainedPolicy) -> None:
        self._policy = policy
        worker = policy.worker
        self._decode = worker.family.load_decoder(worker.device)
        self._sound = worker.family.load_sound_decoder(worker.device)

    def draw(self, samples: Sequence[Sample]) -> list[Clip]:
        """Clips, drawn in one pass and decoded one by one."""
        latents = self._policy.sample([sample.prompt for sample in samples], [sample.seed for sample in samples])
        return [self._decoded(torch.from_numpy(latents[i : i + 1])) for i in range(len(samples))]

    def _decoded(self, latents: Tensor) -> Clip:
        frames = as_frames(self._decode(latents)[0].permute(0, 2, 3, 1).cpu().numpy())
        return Clip(frames, None if self._sound is None else self._sound(latents))


@dataclass(frozen=True)
class PipelineSource:
    """A diffusers pipeline, drawn from as diffusers does it itself."""

    model: str
    folder: PipelineFolder
    drawing: Drawing

    @property
    def stills(self) -> bool:
        """Whether it makes images."""
        if "num_frames" not in inspect.signature(self._class().__call__).parameters:
            return True
        return call_size(self._class(), self.folder.path, self.drawing.size).get("num_frames") == 1

    def identity(self) -> dict[str, str]:
        """Its folder, with a hash of its configurations and of both ends of its weight files."""
        digest = hashlib.sha256()
        for part in sorted(part for part in self.folder.path.iterdir() if (part / "config.json").is_file()):
            digest.update(self.folder.fingerprint(part.name).encode())
        adapter = self.drawing.adapter
        return {
            "model": str(self.folder.path.resolve()),
            "weights": digest.hexdigest()[:16],
            **({"adapter": str(adapter.resolve())} if adapter is not None else {}),
        }

    def check(self, samples: Sequence[Sample]) -> None:
        """Checks settings, adapter and pictures; warns of prompts that are cut."""
        folder, drawing = self.folder.path, self.drawing
        if drawing.protocol == "inference_rgg":
            raise ConfigError("--protocol inference_rgg needs the process reward model: give the run's folder")
        if drawing.base:
            raise ConfigError(f"--base: {folder} is a pipeline, not a run that began with another one; leave it out")
        kind = self._class()
        if drawing.adapter is not None:
            if not hasattr(kind, "load_lora_weights"):
                raise ConfigError(f"--adapter: diffusers' {kind.__name__} loads no adapters; export the whole policy")
            if not (drawing.adapter / ADAPTER_FILE).is_file():
                raise ConfigError(
                    f"--adapter: {drawing.adapter} holds no {ADAPTER_FILE}; give a folder that export --adapter wrote"
                )
        if _needs_image(kind) and (without := [sample.prompt for sample in samples if sample.image is None]):
            raise ConfigError(
                f"{folder} is a {kind.__name__}, which needs an image with each prompt, and {without[0]!r} has none; "
                'give prompts in .jsonl files, one {"prompt": ..., "image": ...} a line'
            )
        for image in {sample.image for sample in samples if sample.image is not None}:
            open_picture(image)
        call_size(kind, folder, drawing.size)
        self._warn_of_cut_prompts(kind, [sample.prompt for sample in samples])

    def _class(self) -> Any:
        import diffusers

        name = str(self.folder.index().get("_class_name"))
        if self.folder.index_file != INDEX:
            raise ConfigError(
                f"MODEL: {self.folder.path} is a {name}, a modular pipeline, which is called with diffusers itself; "
                "give the run that trained it, or one of its checkpoints"
            )
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ConfigError(f"MODEL: by its model_index.json {self.folder.path} is a {name}, which is no pipeline of "
                              "diffusers; download or copy it again")  # fmt: skip
        return kind

    def _warn_of_cut_prompts(self, kind: Any, prompts: Sequence[str]) -> None:
        """Warns as runs do, where there is an adapter of ours that knows the tokenizers."""
        if str(self.folder.index().get("_class_name")) not in FAMILIES:
            return
        config = ModelConfig(path=str(self.folder.path), height=SIDE, width=SIDE)
        limit = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
        if limit is not None and isinstance(limit.default, int):
            config = config.model_copy(update={"max_prompt_tokens": limit.default})
        family = FAMILIES[str(self.folder.index()["_class_name"])]
        if self.folder.component_config(family.backbone).get("guidance_embeds"):
            config = config.model_copy(update={"embedded_guidance": 1.0})
        warn_of_cut_prompts(adapter_of(self.folder, config), prompts)

    def load(self) -> Model:
        """The pipeline, loaded."""
        # On another node a hub id is elsewhere.
        folder = self.folder.path if self.folder.path.exists() else _found(self.model).path
        pipeline = load_pipeline(folder, self.drawing.dtype)
        if self.drawing.adapter is not None:
            pipeline.load_lora_weights(str(self.drawing.adapter))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(local_device())
        size = call_size(type(pipeline), self.folder.path, self.drawing.size)
        return PipelineModel(pipeline, self.drawing, size)


class PipelineModel:
    """A loaded pipeline of diffusers."""

    def __init__(self, pipeline: Any, drawing: Drawing, size: Mapping[str, int]) -> None:
        self._pipeline = pipeline
        self._settings: dict[str, Any] = {"num_inference_steps": drawing.steps, "output_type": "np", **size}
        if drawing.guidance_scale is not None:
            self._settings["guidance_scale"] = drawing.guidance_scale

    def draw(self, samples: Sequence[Sample]) -> list[Clip]:
        """Clips, in one call; those that begin with a picture one by one."""
        if any(sample.image is not None for sample in samples) and _needs_image(type(self._pipeline)):
            return [self._call([sample], image=open_picture(_picture(sample)))[0] for sample in samples]
        return self._call(samples)

    def _call(self, samples: Sequence[Sample], **more: Any) -> list[Clip]:
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        prompts = [str(sample.prompt) for sample in samples]
        # Some pipelines take no lists.
        asked = (prompts, generators) if len(samples) > 1 else (prompts[0], generators[0])
        try:
            result = self._pipeline(prompt=asked[0], generator=asked[1], **self._settings, **more)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            kind, size = type(self._pipeline).__name__, {k: v for k, v in self._settings.items() if k in SIZES}
            raise ConfigError(
                f"diffusers' {kind} fails at {size or 'its own size'}: {one_line(error)}; if it does not make "
                "that size, give another by --height, --width and --frames"
            ) from error
        drawn = result.frames if hasattr(result, "frames") else np.asarray(result.images)[:, None]
        frames = [as_frames(np.asarray(video)) for video in drawn]
        waves = getattr(result, "audio", None)
        if waves is None:
            return [Clip(video) for video in frames]
        rate = int(self._pipeline.vocoder.config.output_sampling_rate)
        return [Clip(video, Sound(wave.float().cpu(), rate)) for video, wave in zip(frames, waves, strict=True)]


def as_frames(video: np.ndarray[Any, Any]) -> Frames:
    """A clip with values in [0, 1] as pixels."""
    return np.asarray((video * 255).round(), dtype=np.uint8)


def call_size(kind: Any, folder: Path, size: SampleSize) -> dict[str, int]:
    """Arguments of a pipeline's call for a size: that of its export, or of the run whose folder it is in, unless given.

    Raises:
        ConfigError: the pipeline takes no number of frames.
    """
    known = read_sample_size(folder)
    described = folder.parent / RESOLVED
    if not known and described.is_file():
        run: RunConfig = load_config(described)
        known = {"height": run.model.height, "width": run.model.width, "frames": run.model.frames}
    wanted = known | checked_size(size)
    frames = wanted.pop("frames", None)
    if "num_frames" in inspect.signature(kind.__call__).parameters and frames is not None:
        return wanted | {"num_frames": frames}
    if frames not in (None, 1):
        raise ConfigError(f"--frames: {folder} is a {kind.__name__}, which makes images; leave it out")
    return wanted


def _needs_image(kind: Any) -> bool:
    from euphonium.generators.registry import FAMILIES

    family = FAMILIES.get(kind.__name__)
    if family is not None:
        return family.takes_image
    taken = inspect.signature(kind.__call__).parameters
    return ("image" in taken and taken["image"].default is inspect.Parameter.empty) or "ImageToVideo" in kind.__name__


def _picture(sample: Sample) -> Path:
    assert sample.image is not None  # checked before anything was loaded
    return sample.image
