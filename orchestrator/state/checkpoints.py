"""The checkpoints of a run: creating and committing them, finding the newest undamaged one, removing old ones.

A folder ``step_N`` exists only once everything in it is on disk, and nothing is loaded before its files have been
verified against its manifest (euphonium/files.py). What the learner group and the process reward model write into a
folder is up to them.

Waits for: a commit hashes all files on a thread; the next commit, and the end of a run, wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from euphonium.errors import CheckpointError
from euphonium.files import commit_folder, verify_folder, writing

log = logging.getLogger(__name__)

FORMAT = 4
STATE = "state.json"
CONFIG = "config.yaml"
# The recipe in the run's own folder, as its last start resolved it.
RESOLVED = "config.resolved.yaml"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Progress of a run, as a checkpoint stores it.

    Attributes:
        iteration: number of iterations done, which is also the policy version.
        next_group: ordinal of the first group that has not been trained on.
        world_size: number of learner ranks that wrote the shards.
    """

    iteration: int
    next_group: int
    world_size: int


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files are as they were written."""

    folder: Path
    state: RunState

    def recipe(self) -> str:
        """The recipe of its run, as YAML."""
        return (self.folder / CONFIG).read_text(encoding="utf-8")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: the folder that holds them.
        keep_last: number of newest checkpoints that are kept.
        keep_every: checkpoints of iterations that this divides are kept as well; None for no others.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None = None) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._being_filled: set[Path] = set()

    def begin(self, iteration: int) -> Path:
        """Creates a temporary folder for the ranks to write to.

        Raises:
            CheckpointError: the file system refused.
        """
        folder = self.folder / f"step_{iteration:06d}.tmp-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(f"the checkpoint of iteration {iteration}", self.folder):
            folder.mkdir()
        self._being_filled.add(folder)
        return folder

    def commit(self, folder: Path, state: RunState, config_yaml: str) -> Checkpoint:
        """Makes a filled folder a checkpoint, then removes old ones; takes long, because it hashes all files.

        Raises:
            CheckpointError: the file system refused, for example because it is full.
        """
        with writing(f"the checkpoint of iteration {state.iteration}", self.folder):
            return self._commit(folder, state, config_yaml)

    def _commit(self, folder: Path, state: RunState, config_yaml: str) -> Checkpoint:
        (folder / STATE).write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n")
        (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
        target = self.folder / f"step_{state.iteration:06d}"
        commit_folder(folder, target, FORMAT)
        self._being_filled.discard(folder)
        self._prune()
        return Checkpoint(target, state)

    def folders(self) -> list[Path]:
        """Folders of all committed checkpoints, also damaged ones, in order."""
        return [folder for folder in sorted(self.folder.glob("step_*")) if ".tmp-" not in folder.name]

    def newest(self, report: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None; calls ``report`` for each damaged one that it skips."""
        for folder in reversed(self.folders()):
            try:
                return verify(folder)
            except CheckpointError as error:
                report(f"skipping a damaged checkpoint: {error}")
        return None

    def _prune(self) -> None:
        old = [folder for folder in self.folders()[: -self._keep_last] if not self._is_kept_for_good(folder)]
        abandoned = [folder for folder in self.folder.glob("*.tmp-*") if folder not in self._being_filled]
        for folder in [*old, *abandoned]:
            shutil.rmtree(folder, ignore_errors=True)

    def _is_kept_for_good(self, folder: Path) -> bool:
        return self._keep_every is not None and int(folder.name.removeprefix("step_")) % self._keep_every == 0

    def abandon(self, folder: Path) -> None:
        """Gives up a folder of :meth:`begin`, which the next commit will remove."""
        self._being_filled.discard(folder)


class BackgroundCommits:
    """Commits checkpoints on a thread, one at a time, while the run goes on.

    Attributes:
        newest: checkpoint from which a restarted learner group resumes, or None.
    """

    def __init__(
        self,
        store: CheckpointStore,
        start: RunState,
        newest: Checkpoint | None,
        tell: Callable[[Checkpoint], Awaitable[None]],
    ) -> None:
        """Starts without a commit under way.

        Args:
            store: the run's checkpoints.
            start: state at the start of this process.
            newest: checkpoint that the run is resumed from, or None.
            tell: called with every new checkpoint.
        """
        self._store = store
        self._states = {start.iteration: start}
        self._tell = tell
        self._filling: set[Path] = set()
        self._under_way: asyncio.Task[None] | None = None
        self._seconds: float | None = None
        self.newest = newest

    @property
    def resume_point(self) -> tuple[str | None, int]:
        """Folder and iteration of the newest checkpoint; None and 0 if there is none."""
        return (None, 0) if self.newest is None else (str(self.newest.folder.resolve()), self.newest.state.iteration)

    def newest_folder(self) -> Path | None:
        """Folder of the newest checkpoint, or None."""
        return None if self.newest is None else self.newest.folder

    def state_of(self, iteration: int) -> RunState:
        """State of the run at its start, or at one of its checkpoints."""
        return self._states[iteration]

    def begin(self, iteration: int) -> Path:
        """Creates a temporary folder for the ranks to write to; errors of :meth:`CheckpointStore.begin`."""
        folder = self._store.begin(iteration)
        self._filling.add(folder)
        return folder

    def abandon(self) -> None:
        """Gives up the folders that are being filled, because the ranks that filled them are gone."""
        for folder in self._filling:
            self._store.abandon(folder)
        self._filling.clear()

    async def commit(self, folder: Path, state: RunState, config_yaml: str) -> None:
        """Starts the commit of a filled folder, after waiting for the one before it.

        Raises:
            CheckpointError: the one before could not be written.
        """
        await self.finished()
        self._filling.discard(folder)

        async def commit() -> None:
            began = time.monotonic()
            self.newest = await asyncio.to_thread(self._store.commit, folder, state, config_yaml)
            self._states[state.iteration] = state
            self._seconds = time.monotonic() - began
            await self._tell(self.newest)

        self._under_way = asyncio.ensure_future(commit())

    async def finished(self) -> None:
        """Waits for the commit under way.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            await under_way

    def take_seconds(self) -> float | None:
        """Seconds that the last commit took; None if that has been returned already."""
        seconds, self._seconds = self._seconds, None
        return seconds


def verify(folder: Path) -> Checkpoint:
    """Opens a checkpoint after checking every file against its manifest.

    Raises:
        CheckpointError: something is missing, changed, or in a format of another version.
    """
    verify_folder(folder, FORMAT)
    state = json.loads((folder / STATE).read_text())
    state.pop("format")
    return Checkpoint(folder, RunState(**state))
