"""One writer at a time: a lock on a folder, held by the process that writes to it for as long as it does.

The lock is a ``flock`` on a small file beside the folder, ``.NAME.lock``, which says who holds it. It is beside the
folder, and not in it, because a run may move the folder aside. The kernel gives the lock back when the process ends,
however it ends: after a kill the file stays, and the next process takes it over. File systems of several machines keep
such locks between them if they are mounted so (NFS 4 does, Lustre with ``-o flock``).

Nothing waits for a lock: whoever does not get it is told at once who has it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from euphonium.errors import ConfigError, PreflightError

log = logging.getLogger(__name__)

# What a file system answers that has no locks.
WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
# A process that has just taken a lock has not yet written who it is.
WHO_TIMEOUT_S = 1.0
ATTEMPTS = 50


@contextmanager
def writing_alone(folders: Sequence[tuple[Path, str]]) -> Iterator[None]:
    """Holds the locks of some folders, which need not exist; makes the folders that they are in.

    On the way out the lock files are removed, and so are the folders that were made for them if nothing is in them. Of
    several processes that start at once, one may make a folder and another get its lock: that folder stays, empty.

    Args:
        folders: each with the field or argument that names it, for errors.

    Raises:
        PreflightError: another process writes to one of them, to a folder around it, or right inside of it.
        ConfigError: a folder cannot be written to.
    """
    named = {Path(os.path.realpath(folder)): field for folder, field in folders}
    ours = {lock_file(folder) for folder in named}
    with ExitStack() as stack:
        for folder, field in sorted(named.items()):
            stack.callback(_taken(folder, field, ours))
        yield


def lock_file(folder: Path) -> Path:
    """The file whose lock stands for a folder."""
    return folder.parent / f".{folder.name}.lock"


def refuse_unwritable(folder: Path, field: str) -> None:
    """Checks that a folder can be written to, or made, without making it.

    Raises:
        ConfigError: it cannot.
    """
    with _as_config_errors(folder, field):
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


@contextmanager
def _as_config_errors(folder: Path, field: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{field}: {folder} cannot be written to ({error.strerror}: {error.filename}); choose another folder, or "
            "get the right to write there"
        ) from error


def _taken(folder: Path, field: str, ours: set[Path]) -> Callable[[], None]:
    """Takes the lock of one folder; returns what gives it back."""
    file, made = lock_file(folder), []
    with _as_config_errors(folder, field):
        refuse_unwritable(folder, field)
        made = _make(folder.parent)
        try:
            descriptor = _opened(file, folder, field)
        except BaseException:
            _remove_empty(made)
            raise

    def give_back() -> None:
        # Removed while it is held: whoever has opened it meanwhile sees that it is no longer the one.
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)
        _remove_empty(made)

    try:
        # After taking our own: of two that nest, at least one sees the other.
        _refuse_writers_nearby(folder, field, ours)
    except BaseException:
        give_back()
        raise
    return give_back


def _make(folder: Path) -> list[Path]:
    """Makes a folder and those around it; returns the ones that did not exist, innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _opened(file: Path, folder: Path, field: str) -> int:
    """Takes the lock and writes who has it; returns the descriptor that holds it."""
    for _ in range(ATTEMPTS):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Another process that made the folder and had no use for it has just removed it.
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            if not _flock(descriptor, file):
                raise PreflightError(_busy(field, folder, folder, file))
            if _is(descriptor, file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, (json.dumps(_who_we_are()) + "\n").encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))


def _flock(descriptor: int, file: Path) -> bool:
    """Takes the lock if it is free; where the file system has no locks, says so and goes on without."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s); see to it that no second process writes here", file, error)
    return True


def _is(descriptor: int, file: Path) -> bool:
    """Whether the file is still the one that was opened, and not removed or replaced meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _refuse_writers_nearby(folder: Path, field: str, ours: set[Path]) -> None:
    around = [lock_file(place) for place in folder.parents if place.name]
    for file in [*around, *folder.glob(".*.lock")]:
        if file not in ours and _is_held(file):
            other = file.with_name(file.name.removeprefix(".").removesuffix(".lock"))
            raise PreflightError(_busy(field, folder, other, file))


def _is_held(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _who_we_are() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": " ".join(["euphonium", *sys.argv[1:]]),
    }


def _busy(field: str, wanted: Path, held: Path, file: Path) -> str:
    place = str(held) if held == wanted else f"{held}, beside which {wanted} cannot be written,"
    return f"{field}: {place} is being written to by {_who(file)}; wait for its end, stop it, or choose another folder"


def _who(file: Path) -> str:
    deadline = time.monotonic() + WHO_TIMEOUT_S
    while True:
        try:
            who = json.loads(file.read_text(encoding="utf-8"))
            return f"process {who['pid']} on {who['host']} since {who['since']} ({who['command']})"
        except (OSError, ValueError, TypeError, KeyError):
            if time.monotonic() > deadline:
                return "another process"
            time.sleep(0.05)
