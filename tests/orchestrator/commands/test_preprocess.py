"""``euphonium preprocess`` from the command line: what it writes, what it refuses, and that a kill loses little."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from euphonium.config import ModelConfig, RunConfig, load_config
from euphonium.generators.embeddings import encoder_fingerprint
from euphonium.generators.prompt_store import PromptStore
from euphonium.locks import writing_alone
from orchestrator.commands.cli import run_command
from orchestrator.commands.launch import preflight
from orchestrator.commands.preprocess import Encoding, finish_store, open_encoders
from tests.process import Process

PROMPTS = [
    f"a {colour} {icon} moving {way} on a white background"
    for colour in ("red", "blue", "green")
    for icon in ("car", "fish", "crab")
    for way in ("left", "up")
]


def written(path: Path, *prompts: str) -> Path:
    path.write_text("\n".join(prompts))
    return path


def command(file: Path, generator: Path, store: Path, *more: str) -> list[str]:
    settings = ["--model", str(generator), "--output", str(store), "--max-prompt-tokens", "16"]
    return ["preprocess", str(file), *settings, *more]


def shards(store: Path) -> dict[str, int]:
    """Files of a store by when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in store.glob("prompts-*.safetensors")}


def test_prompts_are_encoded_once_and_more_are_added(
    tiny_generator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, first = tmp_path / "of" / "mine", written(tmp_path / "a.txt", *PROMPTS[:5], PROMPTS[0])
    assert run_command(command(first, tiny_generator, store, "--prompts-per-shard", "2")) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == f"{store}: 0 of 6 prompts are encoded"
    assert out[-1].startswith(f"{store}: 6 prompts in 3 shards, 0.0 MB; name it in prompts.embeddings")
    before = shards(store)
    assert sorted(path.name for path in store.parent.iterdir()) == ["mine"]
    more = written(tmp_path / "b.jsonl", f'{{"prompt": "{PROMPTS[1]}", "x": 1}}', f'{{"prompt": "{PROMPTS[7]}"}}')
    assert run_command([*command(more, tiny_generator, store), "--negative-prompt", "a red fish"]) == 0
    assert f"{store}: 2 of 4 prompts are encoded" in capfd.readouterr().out
    reader = PromptStore(store, "f")
    reader.check()
    assert {p for shard in reader.shards for p in shard.prompts} == {*PROMPTS[:5], PROMPTS[7], "", "a red fish"}
    assert len(shards(store)) == 4
    assert before.items() <= shards(store).items(), "what was finished is left alone"


def test_the_index_and_damaged_shards_are_made_anew(tiny_generator: Path, tmp_path: Path) -> None:
    store, file = tmp_path / "store", written(tmp_path / "a.txt", *PROMPTS[:5])
    arguments = command(file, tiny_generator, store, "--prompts-per-shard", "2")
    assert run_command(arguments) == 0
    before = shards(store)
    (store / "index.json").unlink()
    spoiled = sorted(before)[1]
    (store / spoiled).write_bytes((store / spoiled).read_bytes()[:-1])
    (store / f"{sorted(before)[0]}.tmp").write_bytes(b"of a killed writer")
    assert run_command(arguments) == 0
    after = shards(store)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {spoiled}
    PromptStore(store, "f").check()


def test_a_killed_command_goes_on(tiny_generator: Path, tmp_path: Path) -> None:
    words = ("red", "blue", "car", "fish", "left", "up", "white", "gray")
    many = [f"{a} {b} {c} {d}" for a in words for b in words for c in words for d in words][:600]
    store, file = tmp_path / "store", written(tmp_path / "a.txt", *many)
    arguments = command(file, tiny_generator, store, "--prompts-per-shard", "10")
    first = Process(*arguments)
    deadline = time.monotonic() + 60
    while len(shards(store)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.popen.send_signal(signal.SIGKILL)
    first.popen.wait()
    before = shards(store)
    assert 3 <= len(before) < 60, "killed in the middle"
    assert run_command(arguments) == 0
    after = shards(store)
    assert before.items() <= after.items(), "what was finished is left alone"
    reader = PromptStore(store, "f")
    reader.check()
    assert all(prompt in reader for prompt in many)
    assert len(after) == 61
    assert not list(store.glob("*.tmp"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_tasks_write_what_one_process_does(tiny_generator: Path, tmp_path: Path) -> None:
    generator, model = open_encoders(ModelConfig(path=str(tiny_generator), height=512, width=512, max_prompt_tokens=16))
    fingerprint = encoder_fingerprint(generator)
    parts = tuple((a, b) for a, b in zip(PROMPTS[::2], PROMPTS[1::2], strict=True))
    lines: list[str] = []
    for name, workers in (("one", 0), ("tasks", 2)):
        finish_store(Encoding(model, tmp_path / name, fingerprint, (), parts, threads=1), workers, lines.append)
    indices = [json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "tasks")]
    assert len(indices[0]["shards"]) == len(parts)
    assert indices[0] == indices[1]
    one, tasks = (PromptStore(tmp_path / name, "f") for name in ("one", "tasks"))
    for prompt in PROMPTS:
        expected, found = one.encode([prompt]), tasks.encode([prompt])
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert lines[-1].startswith(f"{tmp_path / 'tasks'}: {len(PROMPTS)} prompts in {len(parts)} shards")


def test_one_writer_at_a_time(tiny_generator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store, file = tmp_path / "store", written(tmp_path / "a.txt", *PROMPTS)
    with writing_alone([(store, "--output")]):
        assert run_command(command(file, tiny_generator, store)) == 3
    assert f"--output: {store} is being written to by process" in capfd.readouterr().err
    assert not store.exists()


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ("", (), "PROMPTS: {folder}/a.txt holds no prompt; give one a line"),
        ("# only this\n", (), "holds no prompt"),
        ("a", ("--model", "nowhere"), "model.path: nowhere is neither a folder nor a hub id"),
        ("a", ("--model", "{folder}"), "model.path: {folder} holds no diffusers pipeline"),
        ("a", ("--output", "{folder}"), "--output: {folder} holds 'a.txt', which is no part of a store; give a folder"),
        ("a", ("--output", "{folder}/a.txt"), "--output: {folder}/a.txt cannot be written to (Not a directory"),
        ("a", ("--max-prompt-tokens", "0"), "--max-prompt-tokens"),
        ("a", ("--dtype", "float16"), "--dtype"),
        ("a", ("--workers", "-1"), "--workers"),
        ("a", ("--negative-prompt", "\udcff"), "--negative-prompt '\\udcff': give a text in UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded_is_refused(
    prompts: str, more: tuple[str, ...], message: str, tiny_generator: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "a.txt"
    file.write_text(prompts)
    options = [option.format(folder=tmp_path) for option in more]
    assert run_command([*command(file, tiny_generator, tmp_path / "store"), *options]) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert message.format(folder=tmp_path) in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_store_of_other_settings_is_left_alone(
    tiny_generator: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store, file = tmp_path / "store", written(tmp_path / "a.txt", *PROMPTS[:2])
    assert run_command(command(file, tiny_generator, store)) == 0
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert run_command([*command(file, tiny_generator, store), "--dtype", "bfloat16"]) == 2
    assert "encoded otherwise (dtype float32 instead of bfloat16)" in capfd.readouterr().err
    assert before == {path.name: path.read_bytes() for path in store.iterdir()}


def test_prompts_that_are_cut_are_told(tiny_generator: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path / "a.txt", "a red car", "a car " * 20)
    assert run_command(command(file, tiny_generator, tmp_path / "store")) == 0
    (said,) = (message for message in caplog.messages if message.startswith("prompts: "))
    assert said.startswith("prompts: 1 of 2 are cut to 16 tokens; the longest has 41: 'a car a car")


def test_a_recipe_says_what_to_encode_how_and_where(
    make_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_config()
    recipe, store = tmp_path / "recipe.yaml", tmp_path / "store"
    assert run_command(["preprocess", "--recipe", str(recipe)]) == 2
    assert "recipe.yaml: it names no store; set prompts.embeddings, or give --output" in capfd.readouterr().err
    values = yaml.safe_load(recipe.read_text())
    values["prompts"]["embeddings"] = str(store)
    values["model"] |= {"negative_prompt": "a blur", "dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump(values))
    more = written(tmp_path / "more.txt", PROMPTS[0])
    assert run_command(["preprocess", str(more), "--recipe", str(recipe)]) == 0
    held = {prompt for shard in PromptStore(store, "f").shards for prompt in shard.prompts}
    of_files = {line for name in ("train.txt", "held_out.txt") for line in (tmp_path / name).read_text().splitlines()}
    assert held == {*of_files, PROMPTS[0], "a blur", ""}
    # A run with the recipe takes it: neither type nor number of tokens had to be said again.
    config = load_config(recipe)
    assert "read from" in preflight(config)["text encoders"]
    assert config.model.max_prompt_tokens != ModelConfig.model_fields["max_prompt_tokens"].default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts.txt", "--output", "store"], "--model: it is missing"),
        (["prompts.txt", "--model", "somewhere"], "--output: it is missing"),
        (["--model", "somewhere", "--output", "store"], "PROMPTS: name a file"),
        (["--recipe", "recipes/embedded/dancegrpo.yaml", "--dtype", "bfloat16"], "--dtype: --recipe says it already"),
        (["--recipe", "recipes/hunyuan-video/orm.yaml"], "there is nothing to encode"),
    ],
)
def test_what_is_asked_for_twice_or_not_at_all_is_named(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["preprocess", *arguments]) == 2
    assert message in capfd.readouterr().err
