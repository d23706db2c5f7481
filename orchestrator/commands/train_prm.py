"""``euphonium train-prm``: prepares preferences, trains a process reward model on them, and prints its accuracy.

Preferences come from files, or are samples of the generator itself, ranked by outcome rewards. Preparing them
(drawing, scoring, encoding prompts and videos) is done by tasks on the learners' resources if there is a group.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.rollout import encode_one
from actors.sampler import initial_noise, sample_deterministic
from actors.velocity import velocity_in_passes
from euphonium.config import OrmPoolConfig, PrmConfig
from euphonium.config.rewards import optional_rewards
from euphonium.errors import ConfigError
from euphonium.files import written_aside
from euphonium.generators.conditioning import Conditioning, stack_conditionings
from euphonium.generators.embeddings import stored_encoder
from euphonium.generators.generator import Generator, images_for
from euphonium.generators.registry import open_generator
from euphonium.locks import writing_alone
from euphonium.prompt_files import metadata_of
from euphonium.rewards.total import total_weight, weighted_total
from euphonium.trained_prompts import write_trained_prompts
from euphonium.wire.devices import local_device, reserved_device
from euphonium.wire.passes import Passes
from euphonium.wire.records import Array
from learners.rewards.preference import TENTHS, read_latent
from learners.rewards.preference_files import PreferenceTable
from learners.rewards.prm_data import Drawing, is_prepared, write_paired
from learners.rewards.video_files import read_frames
from learners.rewards.worker import RESULT_FILE
from orchestrator.commands.paths import absolute_paths
from orchestrator.commands.planning import settle_training
from orchestrator.commands.reward_checks import PARTS, check_prm, preference_tables
from orchestrator.commands.reward_group import PrintLine, cluster, map_shares, run_training
from orchestrator.groups.prompts import read_prompts
from orchestrator.report.charts import line_chart
from reward_servers.orm import OrmScorer

BATCH = 32
ACCURACY_FILE = "accuracy.json"
CHART_FILE = "accuracy.png"


def train_prm(config: PrmConfig, say: PrintLine) -> list[float]:
    """Trains a process reward model by a recipe, and writes it to ``config.target``.

    Args:
        config: the recipe.
        say: prints progress.

    Returns:
        Held-out pairwise accuracy by tenth of sigma.

    Raises:
        ConfigError: the preferences cannot be used.
        TrainingError: the group was lost for good, or the loss is not finite.
    """
    config = absolute_paths(config)
    with writing_alone([(config.run_dir, "output_dir"), (config.target, "target")]):
        return _train_alone(config, say)


def _train_alone(config: PrmConfig, say: PrintLine) -> list[float]:
    check_prm(config)
    config = settle_training(config)
    for field, note in config.planned.items():
        say(f"{field}: {note}")
    torch.set_num_threads(config.threads)
    with cluster(config):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if config.preferences is None:
            for part in PARTS:
                _draw(config, part, say)
        else:
            _encode(config, say)
        run_training("prm", config, say)
    write_trained_prompts(config.target, _training_prompts(config))
    result = json.loads((config.run_dir / RESULT_FILE).read_text())
    say(f"{result['training_pairs']} training pairs, {result['held_out_pairs']} held-out pairs")
    say(accuracy_table(result))
    edges = [round(tenth / TENTHS, 1) for tenth in range(TENTHS + 1)]
    (config.run_dir / ACCURACY_FILE).write_text(json.dumps({"sigma_edges": edges, **result}, indent=1) + "\n")
    accuracy_chart(result, config.name).save(config.run_dir / CHART_FILE)
    say(f"wrote {config.target}, {config.run_dir / ACCURACY_FILE} and {CHART_FILE} beside it")
    return list(result["accuracy"])


def _training_prompts(config: PrmConfig) -> list[str]:
    if config.prompts is not None:
        return read_prompts(config.prompts.train, "prompts.train")
    return preference_tables(config)["train"].prompts


def accuracy_table(result: dict[str, Any]) -> str:
    """Accuracy and calibration error by noise level, as a table to print."""
    columns: dict[str, Sequence[float]] = {"accuracy": result["accuracy"]}
    if "accuracy_without_margin" in result:
        columns = {f"pairs {result['margin']:g} apart": result["accuracy"]}
        columns["all pairs"] = result["accuracy_without_margin"]
    columns["calibration error"] = result["calibration_error"]
    lines = [f"{'held-out pairwise accuracy':<28}" + "".join(f"{name:>19}" for name in columns)]
    for tenth in range(TENTHS):
        span = f"sigma {tenth / TENTHS:.1f} - {(tenth + 1) / TENTHS:.1f}"
        lines.append(f"{span:<28}" + "".join(f"{column[tenth]:19.1%}" for column in columns.values()))
    return "\n".join(lines)


def accuracy_chart(result: dict[str, Any], title: str) -> Any:
    """The paper's Figure 3: accuracy over the noise level, with the calibration error."""
    centres = [(tenth + 0.5) / TENTHS for tenth in range(TENTHS)]
    series = {"accuracy": result["accuracy"]}
    if "accuracy_without_margin" in result:
        series = {f"accuracy, pairs {result['margin']:g} apart": result["accuracy"]}
        series["accuracy, all pairs"] = result["accuracy_without_margin"]
    series["calibration error"] = result["calibration_error"]
    return line_chart(
        centres, series, title=f"{title}: held-out pairs", x_label="sigma (0 data, 1 noise)", guides={0.5: "guessing"}
    )


# --- preferences from files ------------------------------------------------------------------------------------


def _encode(config: PrmConfig, say: PrintLine) -> None:
    """Reads preference files, and encodes their prompts and videos."""
    family = open_generator(config.model)
    for part, table in preference_tables(config).items():
        images = {prompt: str(image) for prompt, image in table.images.items()}
        fingerprint = _fingerprint(
            config, family, [[str(f) for f in table.files], table.prompts, table.pairs.tolist(), images]
        )
        folder = config.run_dir / "data" / part
        if is_prepared(folder, fingerprint):
            say(f"{part}: {len(table.files)} samples ready in {folder}")
            continue
        began = time.monotonic()
        shares = map_shares(
            _latent_files, config.learner, len(table.files), say, part, config, table, folder / "encoded"
        )
        files = [file for share in shares for file in share]
        conditioning = _encoded_prompts(config, table.prompts, table.images, say, part)
        write_paired(folder, fingerprint, files, family.latent_shape, table.prompt, table.pairs, conditioning)
        say(f"{part}: {len(files)} samples of {len(table.prompts)} prompts, {len(table.pairs)} pairs, "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip


def _latent_files(share: Iterable[int], config: PrmConfig, table: PreferenceTable, folder: Path) -> list[Path]:
    """Latent files of some samples: given ones are checked, and videos are encoded to new ones."""
    from safetensors.torch import save_file

    from euphonium.generators.encoding import load_encoder

    family, encoder, files = open_generator(config.model), None, []
    for i in share:
        file = table.files[i]
        if _holds_latent(file):
            read_latent(file, family.latent_shape)
            files.append(file)
            continue
        stat = file.stat()
        name = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:24]
        target = folder / f"{name}.safetensors"
        files.append(target)
        if target.exists():
            continue
        encoder = encoder or load_encoder(family, _device(config))
        pixels = torch.from_numpy(read_frames(file)).permute(0, 3, 1, 2).float() / 255
        try:
            latent = encoder(pixels[None])[0]
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as aside:
            save_file({"latent": latent}, aside)
    return files


def _holds_latent(file: Path) -> bool:
    if file.suffix == ".npy":
        return bool(np.load(file, mmap_mode="r").dtype != np.uint8)
    return file.suffix == ".safetensors"


# --- samples that are drawn ------------------------------------------------------------------------------------


def _draw(config: PrmConfig, part: str, say: PrintLine) -> None:
    """Draws samples of every prompt and scores them by the outcome rewards; reuses those in the training's folder."""
    assert config.prompts is not None
    training = part == "train"
    prompts = read_prompts(
        config.prompts.train if training else config.prompts.evaluation,
        "prompts.train" if training else "prompts.evaluation",
    )
    count = config.pairs.samples_per_prompt if training else config.pairs.held_out_samples_per_prompt
    family = open_generator(config.model)
    pairs = config.pairs
    walk = pairs.shift if pairs.grid == "linear" else family.ode_table(pairs.num_steps, pairs).fingerprint()
    settings = [pairs.num_steps, walk, [r.model_dump(mode="json") for r in config.outcome]]
    metadata = [dict(metadata_of(prompt)) for prompt in prompts]
    fingerprint = _fingerprint(config, family, [prompts, count, *settings, *([metadata] if any(metadata) else [])])
    folder = config.run_dir / "data" / part
    if is_prepared(folder, fingerprint):
        say(f"{part}: {len(prompts) * count} samples from {folder}")
        return
    conditioning = _encoded_prompts(config, prompts, images_for(family, config.prompts), say, part)
    index = np.repeat(np.arange(len(prompts)), count)
    drawing = Drawing.begin(folder, fingerprint, (len(index), *family.latent_shape))
    if drawing.done:
        say(f"{part}: {drawing.done} of {len(index)} samples are there already")
    batches = -(-len(index) // BATCH)
    map_shares(_samples, config.learner, batches, say, part, config, prompts, index, conditioning, folder.resolve())
    score = drawing.finish(index, conditioning)
    say(f"{part}: {len(index)} samples, mean score {score.mean():.3f}, spread within a prompt "
        f"{score.reshape(len(prompts), count).std(axis=1).mean():.3f}")  # fmt: skip


def _encoded_prompts(
    config: PrmConfig, prompts: list[str], images: dict[str, Path], say: PrintLine, part: str
) -> Conditioning:
    absolute_images = {prompt: image.resolve() for prompt, image in images.items()}
    return map_shares(_conditioning, config.learner, 1, say, f"{part} prompts", config, prompts, absolute_images)[0]


def _conditioning(
    _: Iterable[int], config: PrmConfig, prompts: Sequence[str], images: Mapping[str, Path]
) -> Conditioning:
    family = open_generator(config.model)
    encoder = family.prompt_encoder(_device(config), images, stored_encoder(_embeddings(config), family))
    stacked = stack_conditionings([encode_one(encoder, prompt) for prompt in prompts])
    return {name: tensor.cpu() for name, tensor in stacked.items()}


def _samples(
    share: Iterable[int], config: PrmConfig, prompts: Sequence[str], index: Array, conditioning: Conditioning,
    folder: Path,
) -> None:  # fmt: skip
    """Draws and scores some batches, and writes each into the folder as it is done; leaves out those that are there."""
    family, device = open_generator(config.model), _device(config)
    transformer = family.load_transformer(device).requires_grad_(False)
    scorer = OrmScorer(config.outcome, family, device, OrmPoolConfig())
    table = family.ode_table(config.pairs.num_steps, config.pairs)
    drawing, passes = Drawing.join(folder), Passes(config.pairs.samples_per_pass, "pairs.samples_per_pass")
    for number in share:
        begin = number * BATCH
        chosen = index[begin : begin + BATCH]
        if drawing.has(begin, len(chosen)):
            continue
        batch = {name: tensor[torch.from_numpy(chosen)].to(device) for name, tensor in conditioning.items()}
        seed = int(np.random.SeedSequence([config.seed, len(prompts), begin]).generate_state(1, np.uint64)[0] >> 1)
        start, _ = initial_noise(family.latent_shape, len(chosen), seed, shared=False, device=device)
        velocity = velocity_in_passes(family, transformer, batch, passes)
        latent = family.finish(sample_deterministic(table, velocity, start), batch).cpu().numpy()
        values = scorer.score(latent, [prompts[i] for i in chosen], optional_rewards(config.outcome))
        drawing.write(begin, latent, weighted_total(values, config.outcome, len(chosen)) / total_weight(config.outcome))


def _fingerprint(config: PrmConfig, family: Generator, what: list[object]) -> str:
    """Hash of everything that prepared samples depend on: the generator, its settings, and what is prepared."""
    parts = family.trained_components().values()
    generator = [family.fingerprint(), *(family.pipeline.fingerprint(part) for part in parts)]
    prepared = _embeddings(config)
    values = [
        config.model.model_dump(mode="json"),
        config.seed,
        generator,
        what,
        *([str(prepared)] if prepared else []),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _embeddings(config: PrmConfig) -> Path | None:
    """Prompts that are encoded already."""
    source = config.prompts or config.preferences
    return source.embeddings if source is not None else None


def _device(config: PrmConfig) -> torch.device:
    """The device of a share of the work: of a task of the learner group's size, or of this process."""
    return local_device() if config.learner is None else reserved_device(config.learner.num_gpus)
