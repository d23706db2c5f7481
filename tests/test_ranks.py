"""What tests hear of ranks that fail or hang; the others would wait for them."""

import textwrap
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(
        textwrap.dedent("""
            import os, sys, time
            import torch.distributed as dist
            dist.init_process_group("gloo")
            rank = dist.get_rank()
            print(f"rank {rank} of {dist.get_world_size()}: {sys.argv[1]}", flush=True)
            dist.barrier()
            if rank == 1 and sys.argv[1] == "fails":
                raise ValueError("what it died of")
            if sys.argv[1] != "ends":
                time.sleep(600)
            dist.destroy_process_group()
        """)
    )
    return file


def test_what_all_ranks_print_is_returned(program: Path) -> None:
    # Libraries warn among it now and then.
    printed = [line for line in run_ranks(2, program, "ends", timeout_s=100).splitlines() if line.startswith("rank ")]
    assert sorted(printed) == ["rank 0 of 2: ends", "rank 1 of 2: ends"]


def test_one_that_fails_ends_the_others_and_says_why(program: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"program.py: .* ended with 1\n(.*\n)*ValueError: what it died of"):
        run_ranks(2, program, "fails", timeout_s=400)
    assert time.monotonic() - began < 200


def test_those_that_hang_are_ended(program: Path) -> None:
    with pytest.raises(AssertionError, match=r"2 of 2 ranks still run after 1 s"):
        run_ranks(2, program, "hangs", timeout_s=1)
