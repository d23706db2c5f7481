"""The checkpoints of a run: which there are, which is the newest whole one, and which are kept.

A folder ``step_N`` exists only once everything in it is on disk, and nothing is loaded before its files have been
verified against its manifest (euphonium/files.py).
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


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        iteration: iterations done, which is also the policy's version.
        next_group: ordinal of the first group that has not been trained on.
        world_size: learner ranks that wrote the shards.
    """

    iteration: int
    next_group: int
    world_size: int


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    state: RunState


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: that holds them.
        keep_last: newest checkpoints that are kept.
        keep_every: those of iterations that it divides are kept as well; None for no others.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None = None) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._being_filled: set[Path] = set()

    def begin(self, iteration: int) -> Path:
        """A new folder, aside, for the ranks to write to.

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
        """Makes a checkpoint of a filled folder, then removes old ones.

        It reads everything that it hashes, so that the run loop has a thread do it; one at a time.

        Raises:
            CheckpointError: the file system refused, for example because it is full.
        """
        with writing(f"the checkpoint of iteration {state.iteration}", self.folder):
            return self._commit(folder, state, config_yaml)

    def _commit(self, folder: Path, state: RunState, config_yaml: str) -> Checkpoint:
        (folder / STATE).write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n")
        (folder / CONFIG).write_text(config_yaml)
        target = self.folder / f"step_{state.iteration:06d}"
        commit_folder(folder, target, FORMAT)
        self._being_filled.discard(folder)
        self._prune()
        return Checkpoint(target, state)

    def folders(self) -> list[Path]:
        """Those of committed checkpoints, whole or damaged, in order."""
        return [folder for folder in sorted(self.folder.glob("step_*")) if ".tmp-" not in folder.name]

    def newest(self, report: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """The newest checkpoint whose files are what its manifest says; tells which it skips, and why."""
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
        """Says that a folder of :meth:`begin` will not be committed; the next commit removes it."""
        self._being_filled.discard(folder)


class BackgroundCommits:
    """Commits filled checkpoints on a thread, one at a time, while the run goes on.

    Attributes:
        newest: checkpoint from which a learner group that is lost resumes, or None.
    """

    def __init__(
        self,
        store: CheckpointStore,
        start: RunState,
        newest: Checkpoint | None,
        tell: Callable[[Checkpoint], Awaitable[None]],
    ) -> None:
        """Args as described in the class.

        Args:
            store: of the run.
            start: where the run begins.
            newest: where it resumes from, if it does.
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
        """Folder of the newest checkpoint, None if there is none, and its iteration."""
        return (None, 0) if self.newest is None else (str(self.newest.folder.resolve()), self.newest.state.iteration)

    def newest_folder(self) -> Path | None:
        """Folder of the newest checkpoint, if there is one."""
        return None if self.newest is None else self.newest.folder

    def state_of(self, iteration: int) -> RunState:
        """Where the run stood at the start, or at one of its checkpoints."""
        return self._states[iteration]

    def begin(self, iteration: int) -> Path:
        """See :meth:`CheckpointStore.begin`."""
        folder = self._store.begin(iteration)
        self._filling.add(folder)
        return folder

    def abandon(self) -> None:
        """Gives up the folders that are being filled: the ranks that filled them are gone."""
        for folder in self._filling:
            self._store.abandon(folder)
        self._filling.clear()

    async def commit(self, folder: Path, state: RunState, config_yaml: str) -> None:
        """Begins to commit a filled folder; waits for the commit before it.

        Raises:
            CheckpointError: that one could not be written.
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
        """How long the last commit took, once."""
        seconds, self._seconds = self._seconds, None
        return seconds


def verify(folder: Path) -> Checkpoint:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: something is missing, changed, or in a format of another version.
    """
    verify_folder(folder, FORMAT)
    state = json.loads((folder / STATE).read_text())
    state.pop("format")
    return Checkpoint(folder, RunState(**state))
