"""The declarations of the roles against the classes that play them, and against a type checker."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from actors.rollout import RolloutActor
from euphonium.wire import roles
from euphonium.wire.balancer import LoadBalancer
from euphonium.wire.weights.store import WeightStore
from learners.rewards.refresh import PrmRefreshActor
from orchestrator.desk import ControlDesk
from orchestrator.learning.mailbox import LearnerMailbox
from reward_servers.orm import OrmActor
from reward_servers.prm import PrmActor

ROOT = Path(__file__).parents[3]
PLAYED_BY = {
    roles.RolloutServer: RolloutActor,
    roles.PrmServer: PrmActor,
    roles.OrmServer: OrmActor,
    roles.PrmRefresher: PrmRefreshActor,
    roles.Balancer: LoadBalancer,
    roles.Mailbox: LearnerMailbox,
    roles.WeightDirectory: WeightStore,
    roles.Desk: ControlDesk,
}


def declared(role: type) -> dict[str, inspect.Signature]:
    methods = {name for cls in role.__mro__ for name in vars(cls) if not name.startswith("_")}
    return {name: inspect.signature(getattr(role, name)) for name in methods}


@pytest.mark.parametrize("role", PLAYED_BY, ids=lambda role: role.__name__)
def test_a_class_keeps_to_its_declaration(role: type) -> None:
    assert declared(role)
    for name, wanted in declared(role).items():
        found = inspect.signature(getattr(PLAYED_BY[role], name))
        assert found.return_annotation == wanted.return_annotation, name
        # Ray adds a parameter of its own to the methods of a class that it has made an actor of.
        own = [p for p in found.parameters.values() if not p.name.startswith("_ray")]
        assert [(p.name, p.annotation) for p in own] == [(p.name, p.annotation) for p in wanted.parameters.values()], (
            name
        )
        assert not any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in own), name


def test_every_role_that_is_declared_is_played() -> None:
    protocols = {cls for _, cls in inspect.getmembers(roles, inspect.isclass) if cls.__module__ == roles.__name__}
    assert protocols - {roles.PoolMember, roles.ServerRef, roles.RolloutContext} == set(PLAYED_BY)


CALLS = """
from ray.actor import ActorProxy
from euphonium.wire.records import UpdateReport
from euphonium.wire.roles import Mailbox

def right(mailbox: ActorProxy[Mailbox], report: UpdateReport) -> None:
    mailbox.acknowledge.remote(0, "attempt", report)

def wrong(mailbox: ActorProxy[Mailbox], report: UpdateReport) -> None:
    {call}
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("mailbox.acknowlege.remote(0, 'attempt', report)", "acknowlege"),
        ("mailbox.acknowledge.remote(0, report)", "Too few arguments"),
        ("mailbox.acknowledge.remote('0', 'attempt', report)", "incompatible type"),
        ("mailbox.acknowledge.remote(0, 'attempt', report)", ""),
    ],
    ids=["misspelt", "missing", "of another type", "right"],
)
def test_a_wrong_call_across_processes_fails_the_type_check(call: str, said: str, tmp_path: Path) -> None:
    snippet = tmp_path / "calls.py"
    snippet.write_text(CALLS.format(call=call))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(snippet)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert (result.returncode == 0) == (said == ""), result.stdout + result.stderr
    assert said in result.stdout
    assert (result.stdout.count(": error:") > 0) == (said != "")
