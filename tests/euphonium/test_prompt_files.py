import copy
import doctest
import json
import pickle
from pathlib import Path

import pytest

from euphonium import prompt_files
from euphonium.errors import ConfigError
from euphonium.prompt_files import Prompt, metadata_of, prompt_images, read_prompt_file


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
        ('{"prompt": "a cat", "image": "none.png"}', r"p\.jsonl:1: image: there is no file .*none\.png"),
        ('{"prompt": "a cat", "image": 3}', r'p\.jsonl:1: the key "image" should name a picture file'),
        ('{"prompt": "a cat", "image": null}', r'p\.jsonl:1: the key "image" should name a picture file'),
        ('{"image": "none.png"}', r'p\.jsonl:1: a line should be an object with a text under the key "prompt"'),
        ('{"prompt": ["a cat"]}', r'p\.jsonl:1: a line should be an object with a text under the key "prompt"'),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompt_file(write(tmp_path / "p.jsonl", line), "prompts.train")


def test_what_else_a_line_says_travels_with_its_text(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", '{"prompt": "a cat", "objects": ["cat"], "seed": 3}', '{"prompt": "a dog"}')
    cat, dog = (prompt.described for prompt in read_prompt_file(file, "f"))
    assert (cat, metadata_of(cat)) == ("a cat", {"objects": ["cat"], "seed": 3})
    assert (type(dog), metadata_of(dog)) == (str, {})
    for copied in (pickle.loads(pickle.dumps(cat)), copy.deepcopy(cat)):
        assert (copied, hash(copied), metadata_of(copied)) == (cat, hash("a cat"), metadata_of(cat))
    assert type(str(cat)) is str


def test_the_list_of_captions_of_another_project_is_read_as_it_is(tmp_path: Path) -> None:
    released = [
        {"prompt_embed_path": "0.pt", "prompt_attention_mask": "0.pt", "caption": "A dog"},
        {"path": "1.mp4", "cap": ["A cat, seen from above", "A cat"]},
        {"caption": "A bird", "prompt": "what it was made of"},
    ]
    (tmp_path / "videos2caption.JSON").write_text(json.dumps(released, indent=4))
    dog, cat, bird = read_prompt_file(tmp_path / "videos2caption.JSON", "f")
    assert dog == Prompt("A dog", None, {"prompt_embed_path": "0.pt", "prompt_attention_mask": "0.pt"})
    assert cat == Prompt("A cat, seen from above", None, {"path": "1.mp4"})
    assert bird.text == "A bird"


def test_one_text_with_two_images_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"")
        write(tmp_path / f"{name}.jsonl", f'{{"prompt": "a cat", "image": "{name}.png"}}')
    with pytest.raises(ConfigError, match="'a cat' has two images"):
        prompt_images([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_lines_end_where_lines_end_and_nowhere_else(tmp_path: Path) -> None:
    odd = "a\u2028b\x0cc\x85d\x1ce"
    (tmp_path / "p.jsonl").write_bytes(
        b'{"prompt": "' + odd.encode().replace(b"\x0c", b"").replace(b"\x1c", b"") + b'"}\r\n'
    )
    assert [prompt.text for prompt in read_prompt_file(tmp_path / "p.jsonl", "f")] == ["a\u2028bc\x85de"]
    (tmp_path / "p.txt").write_bytes(odd.encode() + b"\r\nsecond\rthird\nfourth")
    assert [prompt.text for prompt in read_prompt_file(tmp_path / "p.txt", "f")] == [odd, "second", "third", "fourth"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf# a comment\na dog")
    assert read_prompt_file(tmp_path / "p.txt", "f") == [Prompt("a dog")]
    (tmp_path / "p.JSONL").write_bytes(b'\xef\xbb\xbf{"prompt": "a cat"}')
    assert read_prompt_file(tmp_path / "p.JSONL", "f") == [Prompt("a cat")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.csv", b"a dog", r"^f: \S+p\.csv ends in \.csv; known are \.txt, \.jsonl, \.json$"),
        ("p", b"a dog", r"^f: \S+/p has no ending; known are \.txt, \.jsonl, \.json$"),
        ("p.json", b'{"caption": "A dog"}', r"p\.json: a \.json file of prompts should be a list of objects"),
        ("p.json", b'[{"caption": "A dog"}, {"path": "a"}]', r"p\.json: entry 2 should be an object with a text"),
        ("p.json", b'[{"caption": []}]', r"p\.json: entry 1 should be .* one of the keys caption, cap, prompt"),
        ("p.json", b'[{"caption": " "}]', r"p\.json: entry 1: the prompt is empty"),
        ("p.json", b'["A dog"]', r"p\.json: entry 1 should be an object"),
        ("p.json", b"[]", r"^f: \S+p\.json holds no prompt"),
        ("p.json", b"", r"p\.json: not valid JSON"),
        ("p.json", b'[{"caption": "A dog"', r"p\.json: not valid JSON"),
        ("p.jsonl", b'{"prompt": " "}', r"p\.jsonl:1: the prompt is empty"),
        ("p.jsonl", b'\n{"prompt": "a", "prompt": "b"}', r"p\.jsonl:2: .*'prompt' is given twice"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', r"p\.jsonl:1: .*half of a character"),
        ("p.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", r"p\.jsonl:1: not readable JSON"),
        ("p.jsonl", b"[" * 100_000, r"p\.jsonl:1: .*nested too deeply"),
        ("p.jsonl", b'{"prompt": NaN}', r"p\.jsonl:1: .*NaN is no number"),
        ("p.jsonl", b'{"prompt": "a", "image": "\\u0000"}', r"p\.jsonl:1: image: there is no file"),
        ("p.jsonl", b'{"prompt": "a", "image": "' + b"x" * 300 + b'"}', r"p\.jsonl:1: image: .*File name too long"),
        ("p.jsonl", b'{"prompt": "a", "image": "."}', r"p\.jsonl:1: image: .*it is no file"),
        ("p.txt", b"ok\nok\xff", r"^f: \S+p\.txt is not UTF-8: byte 5 \(line 2\) is 0xff; save the file as UTF-8$"),
        ("p.txt", b"\xef\xbb\xbfok\xff", r"byte 5 \(line 1\)"),
        ("p.txt", "a dog".encode("utf-16"), r"byte 0 \(line 1\) is 0xff"),
        ("p.txt", b"\n# only a comment\n", r"f: \S+p\.txt holds no prompt"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_named(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as refused:
        read_prompt_file(tmp_path / name, "f")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", [".txt", "none.txt", "x" * 300 + ".txt", "a\0b.txt", "file/p.txt"])
def test_paths_that_cannot_be_read_are_named_with_their_field(path: str, tmp_path: Path) -> None:
    (tmp_path / ".txt").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"^prompts\.train: cannot read {tmp_path}/") as refused:
        read_prompt_file(tmp_path / path, "prompts.train")
    assert "\n" not in str(refused.value)


def test_the_example_holds() -> None:
    assert doctest.testmod(prompt_files) == (0, 2)
