"""Log files of a run's roles: ``logs/<role>.log`` in the run's folder, with role, node and iteration in every line.

Every process of a role writes its own file, whichever node it is on, because the run's folder is shared. The iteration
is the one that the run loop is at: the driver notes it in a small file there, which the others read when they log.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from pathlib import Path

from typing_extensions import override

FOLDER = "logs"
# What goes to the file and nowhere else, such as what a run prints already.
SAID = "euphonium.said"
# Seconds for which a noted iteration is taken as it was read.
READ_EVERY_S = 0.2
_NOTE = ".iteration"
_CHATTY = ("compilers", "ray", "diffusers", "transformers", "httpx", "DeepSpeed", "matplotlib", "PIL")

log = logging.getLogger(__name__)
logging.getLogger(SAID).propagate = False
logging.getLogger(SAID).setLevel(logging.INFO)


class _RoleFormatter(logging.Formatter):
    """One line a record: time, level, role, node, iteration, logger, message."""

    def __init__(self, folder: Path, role: str) -> None:
        node = platform.node() or "unknown"
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)s {role} {node} iteration=%(iteration)s %(name)s: %(message)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
        )
        self._note = folder / _NOTE
        self._read_at = -READ_EVERY_S
        self._iteration = "-"

    @override
    def format(self, record: logging.LogRecord) -> str:
        record.iteration = self._current()
        return super().format(record)

    def _current(self) -> str:
        now = time.monotonic()
        if now - self._read_at >= READ_EVERY_S:
            self._read_at = now
            try:
                self._iteration = self._note.read_text(encoding="ascii").strip() or "-"
            except (OSError, UnicodeDecodeError):
                # Not noted yet, or the shared folder is away for a moment.
                self._iteration = "-"
        return self._iteration


def begin_logs(run_dir: Path) -> None:
    """Makes the folder, for the driver: without it no role keeps a log."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)


def keep_role_log(run_dir: Path | None, role: str) -> None:
    """Has everything that this process logs from level INFO on written to the role's file, too.

    Nothing happens where the driver has not made the folder; one that cannot be written to is warned of.

    Args:
        run_dir: folder of the run; None keeps no log, of a role outside of a run.
        role: name of the role's process, such as ``rollout-0``; it becomes the file's name.
    """
    if run_dir is None:
        return
    folder = run_dir / FOLDER
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.get_name() == FOLDER]:
        _detach(old)
    if not folder.is_dir():
        return
    try:
        handler = logging.FileHandler(folder / f"{role}.log", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s keeps no log in %s: %s", role, folder, error)
        return
    handler.setFormatter(_RoleFormatter(folder, role))
    handler.setLevel(logging.INFO)
    handler.set_name(FOLDER)
    if not root.handlers:
        # Without any handler Python prints warnings by itself; that must not end with the first one.
        root.addHandler(logging.StreamHandler())
        root.handlers[0].setLevel(logging.WARNING)
    root.setLevel(min(root.level or logging.INFO, logging.INFO))
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    root.addHandler(handler)
    logging.getLogger(SAID).addHandler(handler)
    logging.getLogger(SAID).info("the log of %s begins: process %d", role, os.getpid())


def end_role_log() -> None:
    """Closes this process's file."""
    for handler in [handler for handler in logging.getLogger().handlers if handler.get_name() == FOLDER]:
        _detach(handler)


def note_iteration(run_dir: Path, iteration: int) -> None:
    """Tells all roles which iteration the run is at; a shared folder that is away for a moment is no error."""
    folder = run_dir / FOLDER
    aside = folder / f"{_NOTE}.tmp"
    try:
        aside.write_text(f"{iteration}\n", encoding="ascii")
        aside.rename(folder / _NOTE)
    except OSError as error:
        log.debug("the iteration could not be noted: %s", error)


def _detach(handler: logging.Handler) -> None:
    logging.getLogger().removeHandler(handler)
    logging.getLogger(SAID).removeHandler(handler)
    handler.close()
