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

# File names of a component's weights; repositories may hold copies in other precisions beside them.
_WEIGHT_FILE = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")
_FINGERPRINT_SPAN = 1 << 20


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
        if not (found.path / "model_index.json").is_file():
            raise ConfigError(
                f"model.path: {found.path} holds no diffusers pipeline (model_index.json is missing); give the folder "
                "of one, or download it again"
            )
        return found

    def index(self) -> ComponentConfig:
        """Contents of ``model_index.json``: the pipeline's class, and the class of each component.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        return self._json(Path("model_index.json"))

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


def _downloaded(config: ModelConfig) -> Path:
    if config.path.count("/") != 1 or config.path.startswith((".", "/")):
        raise ConfigError(f"model.path: {config.path} is neither a folder nor a hub id (owner/name); give one")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                # The components only: many repositories hold the same weights in other formats too.
                allow_patterns=["model_index.json", "*/*"],
                ignore_patterns=["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.*", "*.non_ema.*"],
            )
        )
    except Exception as error:
        raise ConfigError(
            f"model.path: {config.path} is no folder here and could not be downloaded ({error}); "
            "give a local folder, or check name, network and HF_TOKEN"
        ) from error
