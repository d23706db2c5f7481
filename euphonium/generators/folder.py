"""A diffusers pipeline on disk: finding or downloading it, its configurations, fingerprints of its weights, export.

Nothing here builds a network or knows what a component does.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from euphonium.config import ModelConfig
from euphonium.errors import ConfigError

# A JSON object from a pipeline's folder; its fields depend on the class of diffusers.
ComponentConfig = dict[str, Any]

# The files that say what a pipeline is made of: a modular pipeline of diffusers has the second one.
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
# Components of modular pipelines for tasks that no adapter has: neither opened nor downloaded.
OF_OTHER_TASKS = ("transformer_ref",)

# File names of a component's weights; repositories may hold copies in other precisions beside them.
_WEIGHT_FILE = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")
_FINGERPRINT_SPAN = 1 << 20


def index_name(folder: Path) -> str | None:
    """Name of the file that says what the pipeline in a folder is made of; None if there is no pipeline.

    A folder may have both. That of a modular pipeline is taken where the other one names such a class too.
    """
    there = [name for name in (INDEX, MODULAR_INDEX) if (folder / name).is_file()]
    if len(there) == 2 and _names_modular(folder / INDEX):
        return MODULAR_INDEX
    return there[0] if there else None


def _names_modular(index: Path) -> bool:
    try:
        held = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(held, dict) and str(held.get("_class_name")).endswith("ModularPipeline")


class PipelineFolder:
    """The folder of a diffusers pipeline; a component, such as ``vae``, is named by its folder.

    Attributes:
        path: path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, config: ModelConfig) -> PipelineFolder:
        """The folder that ``model.path`` names, downloaded from the hub if it is a hub id.

        Raises:
            ConfigError: the path is neither a folder nor a hub id, the download failed, or there is no pipeline in it.
        """
        path = Path(config.path)
        found = cls(path if path.exists() else _downloaded(config))
        if index_name(found.path) is None:
            raise ConfigError(
                f"model.path: {found.path} holds no diffusers pipeline ({INDEX} is missing, and so is "
                f"{MODULAR_INDEX}); give the folder of one, or download it again"
            )
        return found

    @property
    def index_file(self) -> str:
        """Name of the file that :meth:`index` reads."""
        return index_name(self.path) or INDEX

    def index(self) -> ComponentConfig:
        """The pipeline's class, and the class of each component, as ``model_index.json`` has them.

        A modular pipeline's own index adds to every class where its files are. Here they are those of the folder.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        held = self._json(Path(self.index_file))
        for name, entry in held.items():
            if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict):
                held[name] = entry[:2]
        return held

    def component_config(self, component: str, file: str = "config.json") -> ComponentConfig:
        """Configuration of a component, read from ``file`` in its folder.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        return self._json(Path(component, file))

    def _json(self, file: Path) -> ComponentConfig:
        try:
            found = json.loads((self.path / file).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"model.path: {file} of {self.path} cannot be read ({error}); download or copy {self.path} again"
            ) from error
        return _Entries(found, f"{file} of {self.path}", self.path)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, without copies in other precisions."""
        files = (self.path / component).glob("*.safetensors")
        return sorted(file for file in files if _WEIGHT_FILE.fullmatch(file.name))

    def fingerprint(self, component: str) -> str:
        """Hash of a component that does not read all of its gigabytes.

        Covers the configuration, and the size and the first and last MiB of every weight file.
        """
        digest = hashlib.sha256((self.path / component / "config.json").read_bytes())
        for file in self.weight_files(component):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_FINGERPRINT_SPAN))
                stream.seek(max(0, size - _FINGERPRINT_SPAN))
                digest.update(stream.read(_FINGERPRINT_SPAN))
        return digest.hexdigest()[:16]

    def export(self, states: Mapping[str, Mapping[str, Tensor]], target: Path) -> None:
        """Writes a complete pipeline in which some components have new weights.

        Args:
            states: new full states by component.
            target: new folder, to which everything else is copied. Weight files in the root, which some repositories
                have besides the components, are left out: they would hold the old model.
        """
        from safetensors.torch import save_file

        components = {name for name in self.index() if not name.startswith("_")}
        replaced = {self.path / component for component in states}

        def others(folder: str, names: list[str]) -> list[str]:
            if Path(folder) in replaced:
                return [name for name in names if name != "config.json"]
            if Path(folder) == self.path:
                # Repositories may hold the same weights once more, as one file beside the components.
                return [n for n in names if n not in components and Path(n).suffix in (".safetensors", ".ckpt", ".bin")]
            return []

        shutil.copytree(self.path, target, dirs_exist_ok=True, ignore=others)
        for component, state in states.items():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(tensors, target / component / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


class _Entries(ComponentConfig):
    """A JSON object of a pipeline; a lack of an entry is an error that names the file."""

    def __init__(self, entries: ComponentConfig, file: str, folder: Path) -> None:
        super().__init__(entries)
        self._file = file
        self._folder = folder

    def __missing__(self, entry: str) -> object:
        raise ConfigError(f"model.path: {self._file} has no entry {entry!r}; download or copy {self._folder} again")


def may_be_hub_id(path: str) -> bool:
    """Whether a name is no path here and may be that of a model on the hub: owner and name."""
    return not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "/"))


def require_hub_id(path: str) -> None:
    """Checks that a ``model.path`` that is no folder may name a model on the hub: owner and name.

    Raises:
        ConfigError: it does not.
    """
    if not may_be_hub_id(path):
        raise ConfigError(
            f"model.path: {path} is neither a folder nor a hub id (owner/name); give one (paths are relative to "
            f"{Path.cwd()}, where this command runs)"
        )


def _downloaded(config: ModelConfig) -> Path:
    require_hub_id(config.path)
    from huggingface_hub import snapshot_download

    try:
        indices = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=[INDEX, MODULAR_INDEX]))
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                allow_patterns=[INDEX, MODULAR_INDEX, *_wanted_files(PipelineFolder(indices))],
                ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.non_ema.*"],
            )
        )
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model.path: {config.path} is no folder here and could not be downloaded ({error}); "
            "give a local folder, or check name, network and HF_TOKEN"
        ) from error


def _wanted_files(pipeline: PipelineFolder) -> list[str]:
    """Patterns of a repository's files: components only, as many hold the same weights in other formats too."""
    if pipeline.index_file == INDEX:
        return ["*/*"]
    # Beside the components are the folders of the model's own code, which hold all weights once more.
    index = pipeline.index()
    return [f"{name}/*" for name, entry in index.items() if isinstance(entry, list) and name not in OF_OTHER_TASKS]
