"""Any words after ``euphonium``: a documented exit status, one message, and nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.commands.cli import run_command
from tests.fuzz.harness import EXAMPLES, assert_helps, contents, fuzz
from tests.fuzz.values import KEYS, RAW, TEXT

ROOT = Path(__file__).parents[2]
# Commands that would look for a cluster are left out; what they parse first is in tests/orchestrator/commands.
COMMANDS = [
    "train",
    "validate",
    "generate",
    "preprocess",
    "evaluate",
    "export",
    "options",
    "train-prm",
    "train-orm",
    "scale",
    # Without a recipe that can be read these two look for no cluster.
    "render",
    "submit",
    "nonsense",
]
WORDS = st.one_of(
    st.sampled_from(["--help", "-h", "-v", "--verbose", "-p", "--prompt", "-o", "--output", "--seed",
                     "--steps", "--base", "--model", "--workers", "--to", "slurm", "--host", "--address", "--python",
                     "--working-dir", "--image",
                     "--protocol", "implicit", "--policy", "--adapter", "--prm", "--orm", "--prompts", "--",
                     "-", "0", "-1",
                     "none", "recipe.yaml", "run", "rollout=x", "--output=~nobody/x", "a.b=c", "=", "\udcff", "a\0b"]),
    RAW, TEXT, st.tuples(KEYS, RAW).map("=".join),
)  # fmt: skip
STATUS = {0, 1, 2, 3, 6}


@fuzz()
@given(command=st.sampled_from(COMMANDS) | TEXT, words=st.lists(WORDS, max_size=6))
def test_any_words(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if command == "scale" and len(words) > 1:
        words = [*words, "rollout=none"]
    before = contents(tmp_path)
    status = run_command([command, *words])
    out, err = capfd.readouterr()
    assert contents(tmp_path) == before
    check(status, out, err)


def check(status: int, out: str, err: str) -> None:
    assert status in STATUS, err
    assert "Traceback" not in out + err
    if status:
        begin = err.rindex("error: ")
        assert_helps(err[begin:].rstrip("\n"), ["error: "])


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "none", "-p", "a", "--steps", "0"],
        ["validate", "recipe.yaml", "sampler.eta=.nan"],
        ["train", "recipe.yaml", "name=&x [*x]"],
        ["train-prm", "bytes.yaml"],
        ["export", "none", "~nobody-of-this-name/x"],
        ["nonsense"],
    ],
)
def test_the_same_in_a_process_of_its_own(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"extends: {ROOT}/recipes/embedded/euphonium.yaml\n")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    before = contents(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert contents(tmp_path) == before
    assert ended.returncode == 2
    check(ended.returncode, ended.stdout, ended.stderr)


def test_there_are_examples() -> None:
    assert EXAMPLES >= 20
