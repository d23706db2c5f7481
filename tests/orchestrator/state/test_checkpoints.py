import asyncio
import json
from pathlib import Path

import pytest

from euphonium.errors import CheckpointError
from euphonium.files import MANIFEST
from orchestrator.state.checkpoints import BackgroundCommits, Checkpoint, CheckpointStore, RunState, verify


def write(store: CheckpointStore, iteration: int) -> Path:
    folder = store.begin(iteration)
    (folder / "zero3").mkdir()
    (folder / "zero3" / "shard.pt").write_bytes(bytes(range(256)) * iteration)
    (folder / "policy.safetensors").write_bytes(b"weights" * iteration)
    state = RunState(iteration=iteration, next_group=4 * iteration, world_size=2)
    return store.commit(folder, state, "name: demo\n").folder


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_the_newest_is_found_and_old_ones_go(store: CheckpointStore) -> None:
    for iteration in (1, 2, 3):
        write(store, iteration)
    newest = store.newest()
    assert newest is not None
    assert newest.state == RunState(iteration=3, next_group=12, world_size=2)
    assert [p.name for p in sorted(store.folder.iterdir())] == ["step_000002", "step_000003"]


def test_an_unfinished_one_does_not_count(store: CheckpointStore) -> None:
    write(store, 1)
    (store.begin(2) / "policy.safetensors").write_bytes(b"half")
    newest = store.newest()
    assert newest is not None
    assert newest.state.iteration == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "format"])
def test_a_damaged_one_is_skipped_and_named(store: CheckpointStore, damage: str) -> None:
    write(store, 1)
    folder = write(store, 2)
    shard = folder / "zero3" / "shard.pt"
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[100] ^= 4
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        (folder / MANIFEST).unlink()
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(CheckpointError, match="step_000002"):
        verify(folder)
    said: list[str] = []
    newest = store.newest(said.append)
    assert newest is not None
    assert newest.state.iteration == 1
    assert len(said) == 1
    assert "step_000002" in said[0]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1, keep_every=3)
    for iteration in range(1, 9):
        write(store, iteration)
    assert [p.name for p in sorted(store.folder.iterdir())] == ["step_000003", "step_000006", "step_000008"]


def test_a_commit_leaves_alone_what_is_being_filled(store: CheckpointStore) -> None:
    abandoned = store.begin(1)
    store.abandon(abandoned)
    filling = store.begin(3)
    write(store, 2)
    assert filling.is_dir()
    assert not abandoned.exists()


def test_a_disk_that_refuses_is_a_checkpoint_error(store: CheckpointStore) -> None:
    folder = store.begin(1)
    (folder / "policy.safetensors").mkdir()
    (folder / "state.json").mkdir()
    with pytest.raises(CheckpointError, match="iteration 1 could not be written"):
        store.commit(folder, RunState(iteration=1, next_group=4, world_size=2), "name: demo\n")


def test_no_checkpoint_is_no_error(store: CheckpointStore) -> None:
    assert store.newest() is None


def test_commits_beside_the_run_follow_each_other_and_leave_nothing_half_filled(store: CheckpointStore) -> None:
    told: list[Checkpoint] = []
    start = RunState(iteration=0, next_group=0, world_size=2)

    async def tell(checkpoint: Checkpoint) -> None:
        told.append(checkpoint)

    async def run() -> None:
        commits = BackgroundCommits(store, start, None, tell)
        assert commits.resume_point == (None, 0)
        # The group that fills this one dies over it.
        half = commits.begin(1)
        commits.abandon()
        states = [RunState(iteration=i, next_group=4 * i, world_size=2) for i in (1, 2)]
        for state in states:
            folder = commits.begin(state.iteration)
            (folder / "policy.safetensors").write_bytes(b"weights")
            await commits.commit(folder, state, "name: demo\n")
        assert [checkpoint.state for checkpoint in told] == states[:1], "the second waits for the first"
        await commits.finished()
        assert [checkpoint.state for checkpoint in told] == states
        assert commits.newest == told[1]
        assert commits.resume_point == (str((store.folder / "step_000002").resolve()), 2)
        assert [commits.state_of(i) for i in (0, 1, 2)] == [start, *states]
        assert commits.take_seconds() is not None
        assert commits.take_seconds() is None
        assert not half.exists()

    asyncio.run(run())


def test_a_commit_that_fails_beside_the_run_is_heard_of(store: CheckpointStore) -> None:
    async def tell(checkpoint: Checkpoint) -> None:
        raise AssertionError(f"there is none: {checkpoint}")

    async def run() -> None:
        commits = BackgroundCommits(store, RunState(iteration=0, next_group=0, world_size=2), None, tell)
        folder = commits.begin(1)
        (folder / "state.json").mkdir()
        await commits.commit(folder, RunState(iteration=1, next_group=4, world_size=2), "name: demo\n")
        with pytest.raises(CheckpointError, match="iteration 1 could not be written"):
            await commits.finished()
        assert commits.resume_point == (None, 0)

    asyncio.run(run())
