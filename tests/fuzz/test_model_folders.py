"""Damaged models are refused in one line that names folder, component and remedy, or open; nothing else happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from euphonium.config import ModelConfig, OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.generators.components import check_generator, load_pipeline
from euphonium.generators.registry import open_generator
from euphonium.rewards.outcome_model import OutcomeModel
from euphonium.rewards.process import ProcessRewardModel
from euphonium.rewards.registry import build_reward
from euphonium.rewards.videoalign_checkpoint import load_checkpoint
from tests.euphonium.generators.tiny_pipelines import BUILDERS, Folders, model_fields
from tests.euphonium.rewards import test_clip, test_solireward, test_videoalign
from tests.fuzz.damage import Damage, damaged, damages, fuzzed
from tests.learners.rewards.tiny_backbone import build_backbone

CPU = torch.device("cpu")
# What to do: get the files again, or another setting of the recipe.
REMEDY = re.compile(
    r"download|copy it again|supported: |\bset\b|\bleave (it|them) (out|off)|is not among|needs a multiple|\buse\b|"
    r"train one|\bgive\b|see the option|must hold|euphonium train-prm"
)
# Settings of the recipe that a changed configuration no longer fits.
FIELD = re.compile(r"model\.(height|width|frames|embedded_guidance|vae_\w+)")


def check_message(error: ConfigError, folder: Path, parts: set[str]) -> None:
    message = str(error)
    assert "\n" not in message.strip(), message
    assert len(message) < 2000, message
    assert str(folder) in message, message
    assert REMEDY.search(message), message
    assert FIELD.search(message) or any(part in message for part in parts), (message, parts)


def names_of(folder: Path, source: Path) -> set[str]:
    """Components of a pipeline, and its index."""
    return {path.name for path in source.iterdir()} | {path.name for path in folder.iterdir()}


def open_everything(config: ModelConfig) -> None:
    """What the roles load of a generator."""
    family = open_generator(config)
    family.load_transformer(CPU)
    if family.reads_text_with_image:
        family.prompt_encoder(CPU)
    else:
        family.load_prompt_encoder(CPU)
    family.load_decoder(CPU)
    family.fingerprint()


@pytest.mark.timeout(0)
@fuzzed(0.6)
@given(name=st.sampled_from(sorted(BUILDERS)), changes=damages)
def test_a_damaged_pipeline(
    name: str, changes: list[Damage], folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = folders(name)
    scratch = tmp_path_factory.getbasetemp() / "fuzz-pipeline"
    with damaged(source, scratch, changes) as (copy, _):
        config = ModelConfig(**model_fields(name, copy))
        try:
            check_generator(open_generator(config))
        except ConfigError as error:
            check_message(error, copy, names_of(copy, source))
            return
        open_everything(config)


@pytest.mark.timeout(0)
@fuzzed(0.1)
@given(name=st.sampled_from(sorted(BUILDERS)), changes=damages)
def test_a_damaged_export(
    name: str, changes: list[Damage], folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = folders(name)
    with damaged(source, tmp_path_factory.getbasetemp() / "fuzz-export", changes) as (copy, _):
        try:
            load_pipeline(copy)
        except ConfigError as error:
            check_message(error, copy, names_of(copy, source))


@pytest.mark.timeout(0)
@fuzzed(0.15)
@given(changes=damages)
def test_a_damaged_process_reward_model(
    changes: list[Damage],
    tiny_prm: Path,
    tiny_generator: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = ModelConfig(path=str(tiny_generator), frames=9, height=32, width=32, max_prompt_tokens=16)
    with damaged(tiny_prm, tmp_path_factory.getbasetemp() / "fuzz-prm", changes) as (copy, _):
        outcomes = []
        for open_model in (ProcessRewardModel.check, ProcessRewardModel.load):
            try:
                open_model(copy, model)
            except ConfigError as error:
                check_message(error, copy, {"prm.json", "model.safetensors", "process reward model", str(copy)})
                outcomes.append(str(error))
            else:
                outcomes.append("")
        assert outcomes[0] == outcomes[1]


Opened = tuple[Path, Callable[[Path], object]]


@pytest.fixture(scope="module")
def rewards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    """Folder of each reward's weights, and what opens a copy of it."""
    clip = request.getfixturevalue("clip_folder")
    soli = request.getfixturevalue("soli_folder")
    align = request.getfixturevalue("align_folders")
    trained = tmp_path_factory.mktemp("trained")
    backbone = build_backbone(tmp_path_factory.mktemp("backbone"))
    from euphonium.config import BackboneConfig

    described = BackboneConfig(path=str(backbone), frames=2)
    OutcomeModel.from_backbone(described).save(trained)

    def opens(kind: str, **options: object) -> Callable[[Path], object]:
        def build(copy: Path) -> object:
            named = {key: str(copy) if value == "copy" else value for key, value in options.items()}
            return build_reward(OutcomeRewardConfig(name="tested", type=kind, options=named))

        return build

    def align_weights(copy: Path) -> object:
        load_checkpoint.cache_clear()
        return test_videoalign.build({**align, "weights": copy})

    def align_base(copy: Path) -> object:
        load_checkpoint.cache_clear()
        return test_videoalign.build({**align, "base": copy})

    return {
        "clip": (clip, opens("clip_score", weights="copy", device="cpu", dtype="float32")),
        "solireward": (soli, lambda copy: test_solireward.build(copy)),
        "videoalign": (align["weights"], align_weights),
        "videoalign base": (align["base"], align_base),
        "trained": (trained, opens("trained", path="copy", device="cpu")),
        "backbone": (
            backbone, lambda copy: OutcomeModel.from_backbone(described.model_copy(update={"path": str(copy)}))
        ),
    }  # fmt: skip


clip_folder = pytest.fixture(scope="module", name="clip_folder")(test_clip.make_clip)
soli_reference = pytest.fixture(scope="module", name="reference")(test_solireward.read_reference)
soli_folder = pytest.fixture(scope="module", name="soli_folder")(test_solireward.make_checkpoint)
align_folders = pytest.fixture(scope="module", name="align_folders")(test_videoalign.make_published)


@pytest.mark.timeout(0)
@fuzzed(0.15)
@given(
    kind=st.sampled_from(["clip", "solireward", "videoalign", "videoalign base", "trained", "backbone"]),
    changes=damages,
)
def test_damaged_reward_weights(
    kind: str, changes: list[Damage], rewards: dict[str, Opened], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, opened = rewards[kind]
    with damaged(source, tmp_path_factory.getbasetemp() / "fuzz-reward", changes) as (copy, _):
        try:
            opened(copy)
        except ConfigError as error:
            check_message(error, copy, {"option", "model.path", "train-orm"})
