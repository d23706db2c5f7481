"""Whether everything that the roles open of a pipeline is there and fits, found out without loading weights.

Tokenizers and schedulers are opened, since that costs little. Networks are opened by diffusers and transformers
themselves on the meta device: they read configurations, index files and the headers of the weight files, and tell which
weights are missing or have another shape.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from euphonium.errors import ConfigError
from euphonium.generators.folder import PipelineFolder, index_name
from euphonium.generators.generator import Generator
from euphonium.generators.lora import check_targets
from euphonium.generators.processors import without_torchvision
from euphonium.weight_files import check_index, one_line, shapes_of, some

# A class of diffusers or transformers: they share ``from_pretrained``, but no type.
Loadable = Any

LIBRARIES = ("diffusers", "transformers")
# Components of published pipelines that no role opens, unless a family reads pictures with them.
UNOPENED = ("safety_checker", "feature_extractor", "image_encoder", "guider")


def check_generator(family: Generator) -> None:
    """Checks every component that a role opens, and the adapter's targets.

    Raises:
        ConfigError: a component is missing, damaged or does not fit; names folder and component, and what to do.
    """
    own = {family.backbone: family.transformer_class(), "vae": family.vae_class()}
    unopened = tuple(name for name in (*UNOPENED, *family.unopened) if name not in family.image_components)
    networks = check_components(family.pipeline, own, unopened)
    if family.config.lora is not None:
        check_targets(networks[family.backbone], family.config.lora)


def check_components(
    pipeline: PipelineFolder, own: Mapping[str, Loadable] | None = None, unopened: tuple[str, ...] = UNOPENED
) -> dict[str, nn.Module]:
    """Checks the components that a pipeline's index names.

    Args:
        pipeline: the pipeline.
        own: classes that are used whatever the index says, by component; these components must be there.
        unopened: components that are not looked at.

    Returns:
        The networks on the meta device, by component.

    Raises:
        ConfigError: a component is missing, damaged or does not fit.
    """
    networks = {}
    with quiet():
        for name, kind in (component_classes(pipeline) | dict(own or {})).items():
            if name in unopened:
                continue
            with _blaming(pipeline.path, name):
                opened = _open(pipeline.path / name, kind)
            if isinstance(opened, nn.Module):
                networks[name] = opened
    return networks


def load_pipeline(folder: Path, dtype: Literal["float32", "bfloat16"] | None = None) -> Any:
    """The diffusers pipeline in a folder, after a check of all of its components.

    Args:
        folder: the folder.
        dtype: type of its weights; None takes diffusers' choice.

    Raises:
        ConfigError: a component is missing, damaged or does not fit, or they make no pipeline together.
    """
    import diffusers

    pipeline = PipelineFolder(folder)
    name = pipeline.index().get("_class_name")
    with _blaming(folder, pipeline.index_file):
        kind = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ValueError(f"it names the class {name!r}, which is no pipeline of diffusers")
    check_components(pipeline, unopened=())
    with quiet(), _blaming(folder, pipeline.index_file):
        return open_pipeline(diffusers.DiffusionPipeline, folder, torch_dtype=dtype and getattr(torch, dtype))


def open_pipeline(kind: Loadable, folder: Path, **options: Any) -> Any:
    """Opens a folder as a pipeline of diffusers.

    Args:
        kind: the pipeline's class, or ``DiffusionPipeline`` for the one that the folder names.
        folder: the folder.
        options: further arguments of ``from_pretrained``.
    """
    pipeline = PipelineFolder(folder)
    stand_ins = {
        name: of.from_pretrained(folder / name)
        for name, of in component_classes(pipeline).items()
        if of is without_torchvision(pipeline.index()[name][1])
    }
    # diffusers refuses objects of other classes here, but not afterwards.
    loaded = kind.from_pretrained(folder, **options, **dict.fromkeys(stand_ins))
    loaded.register_modules(**stand_ins)
    return loaded


def component_classes(pipeline: PipelineFolder) -> dict[str, Loadable]:
    """The class of each component that the index names, or what stands in for it (:mod:`.processors`)."""
    found: dict[str, Loadable] = {}
    for name, entry in pipeline.index().items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        with _blaming(pipeline.path, name):
            library = _library(entry[0]) if len(entry) == 2 else None
            if library is None:
                raise ValueError(f"{pipeline.index_file} names {entry}, not a class of {' or '.join(LIBRARIES)}")
            found[name] = without_torchvision(str(entry[1])) or getattr(library, str(entry[1]))
    return found


def _library(name: object) -> ModuleType | None:
    """What an index calls ``name``: a library, or diffusers' module of a pipeline with own classes; else None."""
    if name in LIBRARIES:
        return importlib.import_module(str(name))
    from diffusers import pipelines

    found = getattr(pipelines, name, None) if isinstance(name, str) else None
    return found if isinstance(found, ModuleType) else None


def _open(folder: Path, kind: Loadable) -> object:
    if not folder.is_dir():
        raise ValueError(f"{index_name(folder.parent)} names it, but its folder is missing")
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        _require(folder, "config.json")
        return _on_meta(folder, kind)
    # Without these files the libraries take defaults, which are those of another model.
    if hasattr(kind, "config_name"):
        _require(folder, kind.config_name, "_class_name")
    elif hasattr(kind, "vocab_files_names"):
        _require(folder, "tokenizer_config.json")
    return kind.from_pretrained(folder)


def _require(folder: Path, file: str, entry: str | None = None) -> None:
    if not (folder / file).is_file():
        raise ValueError(f"{file} is missing")
    held = json.loads((folder / file).read_text(encoding="utf-8"))
    if not isinstance(held, dict) or (entry is not None and entry not in held):
        raise ValueError(f"{file} holds no configuration")


def _on_meta(folder: Path, kind: Loadable) -> nn.Module:
    """A network of diffusers or transformers without its weights, which are checked by their headers.

    Raises:
        ValueError: a weight file is cut, or weights are missing or have another shape.
        Exception: whatever the library raises, which is as varied as the damage.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        check_index(index)
    for file in sorted(folder.glob("*.safetensors")):
        shapes_of(file)
    network, report = kind.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    if mismatched := [str(entry[0]) for entry in report["mismatched_keys"]]:
        raise ValueError(f"{some(sorted(mismatched))} have another shape than config.json says")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its weight files lack {some(missing)}, which a {kind.__name__} of its config.json has")
    opened: nn.Module = network
    return opened


@contextmanager
def _blaming(folder: Path, component: str) -> Iterator[None]:
    """Names folder and component in whatever a library raises about a component."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"model.path: the component {component} of {folder} cannot be opened: {one_line(error)}; download or copy "
            f"{folder / component} again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars and reports of the libraries off the terminal: what they say is in the errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
            library.disable_progress_bar()
        yield
    finally:
        for library, level, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
