"""``euphonium preprocess``: encodes prompts into a store, so that no run has to hold a text encoder.

Prompts are cut into shards (euphonium/generators/prompt_store.py). Each is encoded and written in this process or by
one of several Ray tasks, which share nothing but the store's folder; this process waits for the shards to appear, and
keeps the index. A killed command leaves whole shards, which the next one finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from euphonium.errors import ConfigError, PreflightError
from euphonium.locks import writing_alone
from orchestrator.commands.arguments import file_argument, negative_prompt_argument
from orchestrator.generation.tasks import Progress, in_tasks

if TYPE_CHECKING:
    from euphonium.config import ModelConfig
    from euphonium.generators.generator import Generator
    from euphonium.generators.prompt_store import Fingerprint, Shard

FIELD = "--output"
# Encoding depends neither on a sample's size nor on guidance; this size suits all pipelines.
SIDE = 512


def preprocess(
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=file_argument,
            metavar="PROMPTS...",
            help="Prompt files: .txt, .jsonl or .json; with --recipe, besides those that it names.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            parser=file_argument,
            help="A recipe: its generator, settings and prompt files, and the store in its prompts.embeddings.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="FOLDER_OR_HUB_ID", help="The generator, as in model.path.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=file_argument, metavar="STORE", help="Folder of encoded prompts."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="As model.revision.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="As model.dtype; default: as there.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="As model.max_prompt_tokens; default: as there.")
    ] = None,
    negative_prompt: Annotated[
        list[str] | None,
        typer.Option(
            parser=negative_prompt_argument, help="As model.negative_prompt; the empty one is always encoded."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, max=10_000, help="Ray tasks; 0 encodes in this process.")] = 0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, max=1000, help="GPUs of each task.")] = 0.0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1000, help="CPU threads of each, as pools.rollout.threads.")
    ] = None,
    prompts_per_shard: Annotated[int, typer.Option(min=1, max=100_000, help="Prompts of a file of the store.")] = 64,
) -> None:
    """Encode prompts once, so that runs with prompts.embeddings load no text encoder.

    The same command goes on where it was killed, and adds further prompts to a store.
    """
    from orchestrator.commands.cli import say

    given = {"model": model, "revision": revision, "dtype": dtype, "max_prompt_tokens": max_prompt_tokens}
    settings = {name: value for name, value in given.items() if value is not None}
    wish = _of_options(settings, output) if recipe is None else _of_recipe(recipe, settings, output)
    wish = dataclasses.replace(
        wish, files=(*wish.files, *(prompts or [])), negative=(*wish.negative, *(negative_prompt or []))
    )
    if not wish.files:
        raise ConfigError("PROMPTS: name a file with prompts, or a recipe that does (--recipe)")
    with writing_alone([(wish.store, FIELD)]):
        work = _prepare(wish, prompts_per_shard, say)
        work = dataclasses.replace(work, threads=threads or work.threads, gpus=gpus_per_worker)
        finish_store(work, workers, say)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is asked for: prompt files and negative prompts, the generator that encodes them, and where they go."""

    files: tuple[Path, ...]
    negative: tuple[str, ...]
    model: ModelConfig
    store: Path


def _of_recipe(recipe: Path, settings: Mapping[str, object], output: Path | None) -> Wish:
    """What a recipe needs encoded; raises ConfigError if it says otherwise than the options, or names no store."""
    from euphonium.config import OrmConfig, load_any_config

    if settings:
        option = "--" + next(iter(settings)).replace("_", "-")
        raise ConfigError(f"{option}: --recipe says it already; leave the option out, or change the recipe")
    config = load_any_config(recipe)
    if isinstance(config, OrmConfig):
        raise ConfigError(f"{recipe}: an outcome reward model reads prompts as texts; there is nothing to encode")
    asked, preferences = config.prompts, getattr(config, "preferences", None)
    files = [] if asked is None else [asked.train, asked.evaluation]
    files += [] if preferences is None else [preferences.train, preferences.held_out]
    named = [section.embeddings for section in (asked, preferences) if section is not None]
    store = output or next(filter(None, named), None)
    if store is None:
        raise ConfigError(f"{recipe}: it names no store; set prompts.embeddings, or give --output")
    model = config.model.model_copy(update={"path": _absolute(config.model.path)})
    return Wish(tuple(filter(None, files)), (model.negative_prompt,), model, store)


def _of_options(settings: Mapping[str, object], output: Path | None) -> Wish:
    from euphonium.config import ModelConfig

    fields = dict(settings)
    path = str(fields.pop("model", ""))
    if not path or output is None:
        missing = FIELD if path else "--model"
        raise ConfigError(f"{missing}: it is missing; give it, or a recipe that says it (--recipe)")
    return Wish(
        (),
        (),
        ModelConfig.model_validate({"path": _absolute(path), "height": SIDE, "width": SIDE, **fields}),
        output,
    )


def _absolute(path: str) -> str:
    """A folder's absolute path, because Ray tasks have another working directory; a hub id as it is."""
    here = Path(file_argument(path))
    return str(here.resolve()) if here.exists() else path


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What there is to encode, and how.

    Attributes:
        model: the generator.
        store: folder of the store.
        fingerprint: of the generator's encoders.
        finished: shards that are there.
        shards: prompts of each further shard.
        threads: CPU threads of each process.
        gpus: GPUs of each Ray task.
    """

    model: ModelConfig
    store: Path
    fingerprint: Fingerprint
    finished: tuple[Shard, ...]
    shards: tuple[tuple[str, ...], ...]
    threads: int
    gpus: float = 0.0


def _prepare(wish: Wish, size: int, say: Callable[[str], None]) -> Encoding:
    """Checks everything, and finds out what is left to encode; writes nothing.

    Raises:
        ConfigError: a file cannot be read, the generator cannot encode, or the store is of another one.
    """
    from euphonium.config import RolloutPoolConfig
    from euphonium.generators.embeddings import encoder_fingerprint
    from euphonium.generators.prompt_length import warn_of_cut_prompts
    from euphonium.generators.prompt_store import finished_shards
    from euphonium.prompt_files import read_prompt_file

    texts = [prompt.text for file in wish.files for prompt in read_prompt_file(file, "PROMPTS")]
    wanted = list(dict.fromkeys([*texts, "", *wish.negative]))
    store = wish.store.resolve()
    generator, model = open_encoders(wish.model)
    fingerprint = encoder_fingerprint(generator)
    finished = finished_shards(store, fingerprint, FIELD)
    warn_of_cut_prompts(generator, texts)
    held = {prompt for shard in finished for prompt in shard.prompts}
    left = [text for text in wanted if text not in held]
    say(f"{store}: {len(wanted) - len(left)} of {len(wanted)} prompts are encoded")
    shards = tuple(tuple(left[begin : begin + size]) for begin in range(0, len(left), size))
    return Encoding(model, store, fingerprint, tuple(finished), shards, threads=RolloutPoolConfig().threads)


def open_encoders(model: ModelConfig) -> tuple[Generator, ModelConfig]:
    """Opens a generator to encode prompts alone; checks its text encoders and tokenizers.

    Args:
        model: path and settings; what else generators need is filled in.

    Returns:
        The generator, and its settings in full.

    Raises:
        ConfigError: there is no such generator, or its encoders cannot be opened.
    """
    from euphonium.generators.components import check_components
    from euphonium.generators.embeddings import text_components
    from euphonium.generators.folder import PipelineFolder
    from euphonium.generators.registry import FAMILIES, adapter_of

    pipeline = PipelineFolder.find(model)
    family = FAMILIES.get(str(pipeline.index().get("_class_name")))
    if family is not None:
        model = model.model_copy(update={"frames": max(model.frames, family.least_frames)})
        if pipeline.component_config(family.backbone).get("guidance_embeds"):
            model = model.model_copy(update={"embedded_guidance": 1.0})
    generator = adapter_of(pipeline, model)
    if generator.reads_text_with_image:
        raise generator.never_encoded_alone("--model")
    check_components(pipeline, unopened=tuple(set(pipeline.index()) - set(text_components(generator))))
    return generator, model


def finish_store(work: Encoding, workers: int, say: Callable[[str], None]) -> None:
    """Encodes what is left, and writes the index.

    Args:
        work: what there is to encode.
        workers: number of Ray tasks; 0 encodes in this process.
        say: prints progress.

    Raises:
        EuphoniumError: a prompt could not be encoded, or a shard did not appear.
    """
    from euphonium.generators.prompt_store import finished_shards, write_index

    work.store.mkdir(parents=True, exist_ok=True)
    whole = {shard.file for shard in work.finished}
    for file in work.store.iterdir():
        # Shards that were damaged, and what a killed command was writing.
        if file.suffix in (".tmp", ".safetensors") and file.name not in whole:
            file.unlink()
    write_index(work.store, work.fingerprint, work.finished)
    total = sum(map(len, work.shards))
    progress = Progress(total, "prompts encoded", "no shard is finished", say)
    for done in _in_tasks(work, min(workers, len(work.shards))) if workers and work.shards else _here(work):
        if progress.at(done):
            write_index(work.store, work.fingerprint, finished_shards(work.store, work.fingerprint, FIELD))
    shards = finished_shards(work.store, work.fingerprint, FIELD)
    write_index(work.store, work.fingerprint, shards)
    held = {prompt for shard in shards for prompt in shard.prompts}
    lacking = sum(prompt not in held for shard in work.shards for prompt in shard)
    if lacking:
        raise PreflightError(
            f"{FIELD}: {lacking} of {total} prompts that were encoded did not appear in {work.store}: give a folder "
            "that all nodes share, under one path"
        )
    say(f"{work.store}: {len(held)} prompts in {len(shards)} shards, "
        f"{sum(shard.nbytes for shard in shards) / 1e6:.1f} MB; name it in prompts.embeddings")  # fmt: skip


def encode_shards(work: Encoding, share: Sequence[Sequence[str]]) -> Iterator[int]:
    """Encodes and writes some shards, but for those that are there; yields the number of prompts after each.

    Raises:
        PreflightError: the encoders on this machine are others.
    """
    import torch

    from euphonium.generators.components import quiet
    from euphonium.generators.embeddings import encoder_fingerprint
    from euphonium.generators.prompt_store import shard_name, write_shard
    from euphonium.generators.registry import open_generator
    from euphonium.wire.devices import local_device

    torch.set_num_threads(work.threads)
    generator = open_generator(work.model)
    if encoder_fingerprint(generator) != work.fingerprint:
        raise PreflightError(f"--model: {generator.folder} is another model on another machine; copy it there again")
    encode, done = None, 0
    for prompts in share:
        if not (work.store / shard_name(work.fingerprint, prompts)).exists():
            if encode is None:
                with quiet():
                    encode = generator.load_prompt_encoder(local_device())
            # Each alone, as rollout actors encode them (others would pad it), and off the GPU before the next.
            write_shard(work.store, work.fingerprint, prompts, map(encode, ([prompt] for prompt in prompts)))
        done += len(prompts)
        yield done


def _here(work: Encoding) -> Iterator[int]:
    yield from encode_shards(work, work.shards) if work.shards else ()


def _in_tasks(work: Encoding, workers: int) -> Iterator[int]:
    """Has Ray tasks encode the shards; yields the number of prompts that are done, again and again."""
    from euphonium.generators.prompt_store import shard_name

    sizes = {shard_name(work.fingerprint, prompts): len(prompts) for prompts in work.shards}
    shares = [work.shards[i::workers] for i in range(workers)]
    for _ in in_tasks(encode_share, work, shares, {"num_gpus": work.gpus}, "preprocess"):
        yield sum(size for name, size in sizes.items() if (work.store / name).exists())


def encode_share(work: Encoding, share: Sequence[Sequence[str]]) -> None:
    """A Ray task: encodes a share of the shards on what it has reserved."""
    from euphonium.wire.devices import reserved_device

    reserved_device(work.gpus)
    for _ in encode_shards(work, share):
        pass
