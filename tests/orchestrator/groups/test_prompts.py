from pathlib import Path

import pytest

from euphonium.errors import ConfigError
from euphonium.prompt_files import metadata_of
from orchestrator.groups.prompts import PromptStream, read_prompts, spread


def test_an_epoch_holds_every_prompt_once_and_epochs_differ() -> None:
    prompts = [f"prompt {i}" for i in range(7)]
    stream = PromptStream(prompts, seed=3)
    epochs = [[stream.task(7 * e + i).prompt for i in range(7)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == prompts
    assert epochs[0] != epochs[1]


def test_a_task_depends_on_its_ordinal_alone() -> None:
    prompts = ["a", "b", "c"]
    forward = [PromptStream(prompts, seed=1).task(i) for i in range(10)]
    fresh = PromptStream(prompts, seed=1)
    assert [fresh.task(i) for i in reversed(range(10))] == forward[::-1]
    assert len({task.seed for task in forward}) == 10
    assert PromptStream(prompts, seed=2).task(0).seed != forward[0].seed


def test_text_and_json_lines_are_read(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("# a comment\n a red car \n\nblue fish\n")
    assert read_prompts(text, "f") == ["a red car", "blue fish"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a"}\n{"prompt": "# b"}\n')
    assert read_prompts(lines, "f") == ["a", "# b"]


def test_tasks_carry_what_a_line_says_besides_its_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "count": 2}\n{"prompt": "b"}\n')
    stream = PromptStream(read_prompts(tmp_path / "p.jsonl", "f"), seed=0)
    assert {stream.task(i).prompt: metadata_of(stream.task(i).prompt) for i in range(2)} == {"a": {"count": 2}, "b": {}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "p.jsonl:2: not valid JSON"),
        ('{"text": "a"}', "p.jsonl:2: a line should be an object"),
        ('["a"]', "p.jsonl:2: a line should be an object"),
        ('{"prompt": "' + "x" * 5000 + '"}', "p.jsonl:2: the prompt has 5000 characters"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_prompts(path, "prompts.train")


def test_a_missing_or_empty_file_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.train: cannot read"):
        read_prompts(tmp_path / "none.txt", "prompts.train")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt", "prompts.train")


def test_spread_takes_evenly_from_the_whole_file() -> None:
    assert spread(list("abcdefghi"), 3) == ["a", "e", "i"]
    assert spread(["a", "b"], 9) == ["a", "b"]
