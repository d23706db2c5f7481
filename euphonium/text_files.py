r"""Text files that people give: how they are decoded, where their lines end, and the JSON in them.

Every such file (recipes, prompts, preferences) is read here: UTF-8, with or without a byte order mark; lines end at
``\n``, ``\r\n`` or ``\r`` and nowhere else, so that U+2028 or a form feed inside of a prompt stays in it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from euphonium.errors import ConfigError

_LINE_END = re.compile(r"\r\n|\n|\r")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Longest pieces of somebody's input that a message repeats.
SHOWN = 120
SHOWN_PATH = 1000
# So many files in place of one that is not there are named.
LISTED = 12


def read_text(path: Path, field: str) -> str:
    """Reads a text file.

    Args:
        path: the file.
        field: the recipe's field that names it, for errors; empty for a recipe itself.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8; names field, file, and the byte that is not.
    """
    with _opened(path, field) as stream:
        return _decoded(stream.read(), path, field)


def read_lines(path: Path, field: str, endings: Sequence[str]) -> list[str]:
    """The lines of a text file, without what ends them.

    Args:
        path: the file.
        field: the recipe's field that names it, for errors.
        endings: what its name may end with, such as ``.txt``; upper and lower case are the same.

    Raises:
        ConfigError: another ending, or an error of :func:`read_text`.
    """
    with _opened(path, field) as stream:
        if path.suffix.lower() not in endings:
            given = f"ends in {path.suffix}" if path.suffix else "has no ending"
            known = ", ".join(endings)
            raise ConfigError(f"{field}: {shown(path, SHOWN_PATH)} {given}; known are {known}")
        return _LINE_END.split(_decoded(stream.read(), path, field))


@contextmanager
def _opened(path: Path, field: str) -> Iterator[IO[bytes]]:
    prefix, named = f"{field}: " if field else "", shown(path, SHOWN_PATH)
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        why, remedy = error.strerror, "give a file that is here and may be read"
        if isinstance(error, FileNotFoundError):
            remedy = _meant(path) or remedy
        raise ConfigError(f"{prefix}cannot read {named}: {why}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{prefix}cannot read {named}: {error}; give the path of a file") from error


def _meant(path: Path) -> str:
    """Advice for a path that leads nowhere: what resembles it, or what else is there; empty if nothing is."""
    missing = next(way for way in (path, *path.parents) if way.parent.is_dir())
    try:
        # A link that leads nowhere is there itself.
        names = sorted(other.name for other in missing.parent.iterdir() if other != missing)
    except OSError:
        return ""
    if near := difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75):
        return f"did you mean {shown(missing.parent / near[0], SHOWN_PATH)}?"
    if missing != path or not path.suffix:
        return ""
    alike = [name for name in names if Path(name).suffix == path.suffix]
    return f"{shown(path.parent, SHOWN_PATH)} has {', '.join(map(shown, alike))}" if 0 < len(alike) <= LISTED else ""


def _decoded(data: bytes, path: Path, field: str) -> str:
    start = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        line = 1 + len(_LINE_END.findall(data[start:at].decode("utf-8")))
        raise ConfigError(
            f"{field + ': ' if field else ''}{shown(path, SHOWN_PATH)} is not UTF-8: byte {at} (line {line}) is "
            f"0x{data[at]:02x}; save the file as UTF-8"
        ) from error


def parse_json(text: str, place: str) -> object:
    """Parses JSON that somebody gave, more strictly than ``json`` does.

    Args:
        text: the JSON.
        place: file and line, for errors.

    Raises:
        ConfigError: not JSON; a number or a nesting too large; a key given twice, NaN, or half of a surrogate pair.
    """
    try:
        value: object = json.loads(text, object_pairs_hook=_object, parse_constant=_refused)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not valid JSON: {error.msg} at column {error.colno}; correct the line") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: not readable JSON: nested too deeply; correct the line") from error
    except ValueError as error:
        raise ConfigError(f"{place}: not readable JSON: {str(error).partition(';')[0]}; correct the line") from error
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ConfigError(
            f"{place}: an escape such as \\ud83d stands for half of a character; write the character itself"
        )
    return value


def file_beside(folder: Path, name: str, field: str) -> Path:
    """A file that a line of another file names, relative to that file's folder; ``~`` is the home folder.

    Args:
        folder: folder of the file with the line.
        name: what the line says.
        field: place and name of the entry, for errors.

    Raises:
        ConfigError: there is no such file, or it may not be looked at.
    """
    try:
        file = (folder / os.path.expanduser(name)).absolute()
        # Links are not followed in what is returned: what they lead to may have a name without an ending.
        if stat.S_ISREG(file.stat().st_mode):
            return file
        why = "it is no file"
    except OSError as error:
        why = str(error.strerror)
    except (ValueError, RuntimeError) as error:
        why = str(error)
    named = shown(folder / name, SHOWN_PATH)
    raise ConfigError(f"{field}: there is no file {named} ({why}); paths are relative to the file that names them")


def has_surrogates(text: str) -> bool:
    """Whether a text holds halves of surrogate pairs, which cannot be written to a file or a terminal."""
    return _SURROGATE.search(text) is not None


def shown(value: object, limit: int = SHOWN) -> str:
    """A value as a message repeats it: printable, on one line, and cut where it is long."""
    text = str(value)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[:limit]}..."


def quoted(text: object) -> str:
    """A text in quotes, as a message repeats it: escaped where it is not printable, and cut where it is long."""
    whole = str(text)
    return repr(whole) if len(whole) <= SHOWN else repr(whole[:SHOWN]) + "..."


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {quoted(twice)} is given twice")
    return found


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
