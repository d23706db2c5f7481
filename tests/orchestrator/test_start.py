"""A run that starts in a cluster without room for all of its roles."""

from collections.abc import Callable

import pytest

from euphonium.errors import ResourcesError
from tests.stubs.roles import StubRun

pytestmark = pytest.mark.ray


def test_what_has_no_room_is_said_at_once_and_refused_in_the_end(
    stub_config: Callable, execute: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stub_config("pools.orm.num_cpus=90", "pools.start_timeout_s=2")
    with pytest.raises(ResourcesError, match=r"1 of 1 orm actors \(orm-0\).* did not start within 2 s"):
        execute(StubRun(config, "tests", None))
    said = capsys.readouterr().out
    assert (
        "not all roles have room in the cluster, and the run waits for more nodes: CPU: the pools reserve 90.03" in said
    )
