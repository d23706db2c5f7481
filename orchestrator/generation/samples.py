"""Which clips a suite of prompts asks for, and the files that its evaluation looks for.

VBench and VBench-2.0 find clips by the text of their prompts, GenEval by number, with the prompt's entry beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from euphonium.config.base import LONGEST_NAME
from euphonium.errors import ConfigError
from euphonium.prompt_files import ENDINGS, Prompt, read_prompt_file
from euphonium.text_files import quoted
from orchestrator.generation.clips import Format, ending

Layout = Literal["plain", "vbench", "vbench2", "geneval"]
FIELD = "--prompt-file"
# What clips of a suite are called after where they are drawn from a longer wording of the prompt.
NAME = "prompt_en"
# Characters of a prompt in VBench-2.0's file names.
VBENCH2_CHARACTERS = 180
# Samples a prompt where nothing else is asked for, as the suites' instructions have it.
SAMPLES: Mapping[Layout, int] = {"plain": 1, "vbench": 5, "vbench2": 3, "geneval": 4}
MORE_SAMPLES: Mapping[tuple[Layout, str], int] = {("vbench", "temporal_flickering"): 25, ("vbench2", "Diversity"): 20}


@dataclass(frozen=True)
class Sample:
    """A clip to be drawn.

    Attributes:
        file: relative to the output folder.
        prompt: the text.
        seed: seed of its noise.
        image: picture of its first frame, or None.
    """

    file: str
    prompt: str
    seed: int
    image: Path | None = None


@dataclass(frozen=True)
class Plan:
    """All clips of a suite.

    Attributes:
        samples: the clips.
        beside: further files, with their contents.
    """

    samples: list[Sample]
    beside: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite, and the part of the suite that it is in (VBench's dimension); None for none."""

    prompt: Prompt
    part: str | None


def read_suite(paths: Sequence[Path]) -> list[SuitePrompt]:
    """Reads prompt files, and folders of them, whose files are parts of a suite called by their names.

    Raises:
        ConfigError: one cannot be read, or a folder holds none.
    """
    found: list[SuitePrompt] = []
    for path in paths:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{FIELD}: {path} holds no prompt files ({', '.join(ENDINGS)}); give a folder that does")
        for file in files:
            found += [SuitePrompt(prompt, _part(prompt, file)) for prompt in read_prompt_file(file, FIELD)]
    return found


def _part(prompt: Prompt, file: Path) -> str:
    """The dimension that an entry of VBench's full information names first; else its file's name."""
    named = prompt.metadata.get("dimension")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first else file.stem


@dataclass(frozen=True)
class Seeds:
    """Seeds of the noise.

    Attributes:
        first: that of the first clip; each clip has the next one.
        each: instead: those with which every prompt is drawn.
        samples: clips a prompt; None for as many as the layout has, or as there are seeds.
    """

    first: int = 0
    each: tuple[int, ...] = ()
    samples: int | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that contradict each other."""
        if self.each and self.samples is not None and self.samples != len(self.each):
            raise ConfigError(
                f"--samples-per-prompt {self.samples}: --seeds gives {len(self.each)}, one a sample; leave one of the "
                "two out"
            )
        if len(set(self.each)) < len(self.each):
            raise ConfigError("--seeds: a seed is given twice, which would draw the same clips twice; leave one out")

    def count(self, layout: Layout, part: str | None) -> int:
        """Clips of a prompt."""
        return self.samples or len(self.each) or MORE_SAMPLES.get((layout, part or ""), SAMPLES[layout])


def plan_samples(suite: Sequence[SuitePrompt], layout: Layout, form: Format, seeds: Seeds) -> Plan:
    """The clips of a suite.

    Args:
        suite: its prompts; one that a layout calls alike is drawn once.
        layout: which evaluation the files are for.
        form: of the files.
        seeds: seeds, and number of clips a prompt.

    Raises:
        ConfigError: a prompt cannot name a file, or lacks what the evaluation needs.
    """
    samples: dict[str, Sample] = {}
    beside: dict[str, str] = {}
    drawn = 0
    for number, entry in enumerate(suite):
        if layout == "geneval":
            beside[f"images/{number:05d}/metadata.jsonl"] = _geneval_entry(entry.prompt)
        for j, file in enumerate(_files(entry, number, layout, form, seeds.count(layout, entry.part))):
            if file not in samples:
                seed = seeds.each[j] if seeds.each else seeds.first + drawn
                samples[file] = Sample(file, entry.prompt.described, seed, entry.prompt.image)
                drawn += 1
    return Plan(list(samples.values()), beside)


def _files(entry: SuitePrompt, number: int, layout: Layout, form: Format, count: int) -> Iterator[str]:
    end = ending(form)
    if layout == "geneval":
        yield from (f"images/{number:05d}/samples/{j:05d}{end}" for j in range(count))
    elif layout == "plain":
        yield from (f"{number:04d}-{j}{end}" for j in range(count))
    else:
        # VBench-2.0 keeps its dimensions apart, whose prompts overlap; VBench has all of them in one folder.
        folder = f"videos/{entry.part}" if layout == "vbench2" and entry.part else "videos"
        cut = VBENCH2_CHARACTERS if layout == "vbench2" else None
        for j in range(count):
            yield f"{folder}/{_checked(f'{_name(entry.prompt)[:cut]}-{j}{end}')}"


def _name(prompt: Prompt) -> str:
    named = prompt.metadata.get(NAME)
    return named.strip() if isinstance(named, str) and named.strip() else prompt.text


def _checked(name: str) -> str:
    if "/" in name or "\0" in name or len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{FIELD}: VBench calls clips by their prompts, and no file can be called {quoted(name)}; shorten it, or "
            f'give a shorter one under the key "{NAME}" of a .jsonl file'
        )
    return name


def _geneval_entry(prompt: Prompt) -> str:
    if not {"tag", "include"} <= prompt.metadata.keys():
        raise ConfigError(
            f"--layout geneval: {quoted(prompt.text)} lacks the keys tag and include by which GenEval judges it; give "
            "GenEval's evaluation_metadata.jsonl"
        )
    return json.dumps({**prompt.metadata, "prompt": prompt.text}) + "\n"


def texts(prompts: Iterable[str]) -> list[SuitePrompt]:
    """Prompts of the command line as a suite."""
    return [SuitePrompt(Prompt(text), None) for text in prompts]
