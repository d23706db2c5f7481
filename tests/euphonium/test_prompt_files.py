from pathlib import Path

import pytest

from euphonium.errors import ConfigError
from euphonium.prompt_files import Prompt, prompt_images, read_prompt_file


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_images_are_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "cat.png").write_bytes(b"")
    file = write(tmp_path / "p.jsonl", '{"prompt": " a cat ", "image": "frames/cat.png"}', "", '{"prompt": "a dog"}')
    cat = (tmp_path / "frames" / "cat.png").resolve()
    assert read_prompt_file(file, "prompts.train") == [Prompt("a cat", cat), Prompt("a dog")]
    text = write(tmp_path / "p.txt", "# a comment", "a dog")
    assert prompt_images([file, text]) == {"a cat": cat}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a cat", "image": "none.png"}', r"p\.jsonl:1: there is no image .*none\.png"),
        ('{"prompt": "a cat", "image": 3}', 'the key "prompt", perhaps "image"'),
        ('{"image": "none.png"}', 'the key "prompt", perhaps "image"'),
        ('{"prompt": "a cat", "picture": "none.png"}', 'the key "prompt", perhaps "image"'),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompt_file(write(tmp_path / "p.jsonl", line), "prompts.train")


def test_one_text_with_two_images_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"")
        write(tmp_path / f"{name}.jsonl", f'{{"prompt": "a cat", "image": "{name}.png"}}')
    with pytest.raises(ConfigError, match="'a cat' has two images"):
        prompt_images([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
