"""The documentation: every page is in the site, links lead somewhere, and command lines are ones that exist."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from euphonium.config import load_any_config
from euphonium.errors import ConfigError
from orchestrator.commands.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
# Programs of others, whose arguments are not ours to check.
OTHERS = {"ray", "torchrun", "sort", "export", "python3", "pip", ".venv/bin/pip", ".", "docker", "git"}
PROGRAMS = {"euphonium", "python", "make", *OTHERS}


def nav_pages(entry: Any) -> Iterator[str]:
    for value in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else [entry]:
        if isinstance(value, str):
            yield value
        else:
            yield from nav_pages(value)


def test_every_page_is_in_the_site_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(nav_pages(site["nav"]))
    assert sorted(listed) == sorted(page.name for page in PAGES)


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as mkdocs makes them."""
    found, text = set(), re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_every_recipe_is_listed_with_its_evidence() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    recipes = {str(file.relative_to(ROOT)) for file in (ROOT / "recipes").glob("*/*.yaml") if file.name != "base.yaml"}
    assert set(re.findall(r"`(recipes/[^`]+\.yaml)`", text)) == recipes


def test_what_users_expect_is_answered_with_evidence() -> None:
    """Every answer is yes, partly or no; what is not a plain no leads to something of ours, and commands exist."""
    command: Any = typer.main.get_command(app)
    lines = (ROOT / "docs" / "comparison.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ") and not line.startswith("| expected")]
    assert len(rows) > 30
    for expected, others, answer, where in rows:
        assert others.strip(), expected
        verdict = re.match(r" \*\*(yes|partly|no)\*\*", answer)
        assert verdict, expected
        assert "](" in where or verdict[1] == "no", expected
        for name in re.findall(r"`euphonium ([a-z-]+)", answer):
            assert name in command.commands, expected


def command_lines(page: Path) -> Iterator[str]:
    """Lines of a page's blocks of commands; lines that a backslash joins are one."""
    for language, block in re.findall(r"^ *```([a-z]*)[^\n]*\n(.*?)^ *```", page.read_text(), re.M | re.S):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ").split()
            if words and words[0] in PROGRAMS:
                yield line.strip().removeprefix("$ ")


LINES = sorted({(page.name, line) for page in TEXTS for line in command_lines(page)})


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_are_ones_that_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    if "--" in words:
        # What `ray job submit` and others run.
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert set(words[1:]) <= targets
    elif words[0] == "euphonium":
        check_arguments(words[1:])
    elif "-m" in words and words[0] in ("python", "torchrun"):
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module == "orchestrator":
            check_arguments(arguments)
        else:
            assert importlib.util.find_spec(module) is not None


def check_arguments(words: list[str]) -> None:
    """Parses arguments as the command would, and runs nothing; recipes that are here take the overrides."""
    words = [word for word in words if word != "..."]
    command: Any = typer.main.get_command(app)
    name, context = "euphonium", None
    while hasattr(command, "resolve_command"):
        context = typer.Context(command, info_name=name, parent=context)
        name, command, words = command.resolve_command(context, words)
    parsed = command.make_context(name, list(words), parent=context).params
    recipe = parsed.get("recipe")
    if isinstance(recipe, Path) and recipe.parts[0] == "recipes":
        overrides = [word for word in parsed.get("overrides") or [] if "..." not in word]
        load_any_config(ROOT / recipe, overrides)


def test_a_misspelt_option_or_field_would_be_found() -> None:
    usage_error: Any = typer.BadParameter.__base__
    with pytest.raises(usage_error, match="clip-mb"):
        check_arguments(["report", "runs/demo", "--clip-mb", "3"])
    with pytest.raises(ConfigError, match="etta"):
        check_arguments(["train", "recipes/embedded/euphonium.yaml", "sampler.etta=1"])
    with pytest.raises(usage_error, match="debugg"):
        check_arguments(["debugg", "group"])


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed here; `make docs` has an environment of its own")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
