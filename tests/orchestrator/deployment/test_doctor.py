"""What the doctor makes of facts, and of recipes and nodes that do not fit; and the doctor itself on two Ray nodes."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from euphonium.config import RunConfig
from orchestrator.deployment.findings import Finding, as_json, as_text
from orchestrator.deployment.node_checks import Expected, Node, judge_node
from orchestrator.deployment.node_facts import NodeFacts, collect
from orchestrator.deployment.pool_table import matches, pool_table
from tests.checkout import ROOT, environment

GIB = 1 << 30
OWN = NodeFacts(
    host="here", interpreter="/python", versions={"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0"},
    gpus=[("H100", 81559)] * 8, shared_memory=(200 * GIB, 190 * GIB), disk=(1000 * GIB, 500 * GIB),
    open_files=1_048_576, clock=1000.0, read="word", unreadable=[],
)  # fmt: skip
NODE = Node(
    id="a", name="node-1", resources={"GPU": 8.0, "CPU": 192.0, "object_store_memory": 186.0 * GIB}, labels={},
    roles=("learner",),
)  # fmt: skip


def judged(config: RunConfig | None, node: Node = NODE, **changes: Any) -> dict[str, Finding]:
    facts = dataclasses.replace(OWN, **{"clock": time.time(), **changes})
    expected = Expected(own=OWN, word="word", config=config, since=time.time())
    return {finding.check: finding for finding in judge_node(node, facts, expected)}


def test_a_node_that_is_fit_passes_everything(make_config: Callable[..., RunConfig]) -> None:
    findings = judged(make_config("pools.gpu_memory_gib=80"))
    assert {"versions", "GPUs", "GPU memory", "/dev/shm", "disk", "open files", "clock", "shared folder",
            "weights"} == findings.keys()  # fmt: skip
    assert {finding.result for finding in findings.values()} == {"PASS"}
    assert not any(finding.remedy for finding in findings.values())


@pytest.mark.parametrize(
    ("check", "changes", "result", "detail"),
    [
        ("versions", {"versions": OWN.versions | {"torch": "2.12.0"}}, "FAIL", "torch 2.12.0 (here 2.13.0)"),
        ("versions", {"versions": {"python": "3.11.2", "ray": "2.60.0"}}, "FAIL", "torch none"),
        ("GPUs", {"gpus": [("H100", 81559)] * 7}, "WARN", "has 7"),
        ("GPUs", {"gpus": []}, "WARN", "(none)"),
        ("GPU memory", {"gpus": [("A10", 23028)] * 8}, "FAIL", "22 GiB"),
        ("/dev/shm", {"shared_memory": (GIB // 16, GIB // 16)}, "WARN", "0.1 GiB"),
        ("disk", {"disk": (1000 * GIB, 30 * GIB)}, "FAIL", "30 of 1000"),
        ("disk", {"disk": (100 * GIB, 15 * GIB)}, "WARN", "15 of 100"),
        ("open files", {"open_files": 1024}, "WARN", "1024"),
        ("clock", {"clock": time.time() - 3600}, "WARN", "apart"),
        ("clock", {"clock": time.time() + 3600}, "WARN", "apart"),
        ("shared folder", {"read": None}, "FAIL", "does not see"),
        ("shared folder", {"read": "of another file system"}, "FAIL", "does not see"),
        ("weights", {"unreadable": ["/weights/x"]}, "FAIL", "/weights/x"),
    ],
)
def test_what_is_wrong_has_a_remedy(
    check: str, changes: dict[str, Any], result: str, detail: str, make_config: Callable[..., RunConfig]
) -> None:
    findings = judged(make_config("pools.gpu_memory_gib=80"), **changes)
    assert findings[check].result == result
    assert detail in findings[check].detail
    assert findings[check].remedy
    others = {name: finding for name, finding in findings.items() if name not in (check, "GPU memory")}
    assert {finding.result for finding in others.values()} == {"PASS"}


def test_only_nodes_that_write_must_see_the_runs(make_config: Callable[..., RunConfig]) -> None:
    draws = dataclasses.replace(NODE, roles=("rollout",))
    assert judged(make_config(), draws, read=None)["shared folder"].result == "WARN"
    idle = dataclasses.replace(NODE, roles=())
    assert "shared folder" not in judged(make_config(), idle, read=None)


def test_facts_of_this_machine_are_true(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.bin").write_bytes(b"a")
    (tmp_path / "canary").write_text("word")
    asked = [str(tmp_path / "weights"), str(tmp_path / "missing")]
    facts = collect(str(tmp_path / "none" / "yet"), str(tmp_path / "canary"), asked)
    assert facts.read == "word"
    assert facts.unreadable == [str(tmp_path / "missing")]
    assert facts.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts.interpreter == sys.executable
    assert 0 < facts.disk[1] <= facts.disk[0]
    assert abs(facts.clock - time.time()) < 60


def test_labels_meet_rays_operators() -> None:
    node = {"pool": "rollout", "zone": "a"}
    for condition in ({"pool": "rollout"}, {"zone": "in(a, b)"}, {"zone": "!b"}, {"zone": "!in(b,c)"}, {"new": "!x"}):
        assert matches(condition, node), condition
    for condition in ({"pool": "learner"}, {"zone": "in(b,c)"}, {"zone": "!a"}, {"zone": "!in(a,b)"}, {"new": "x"}):
        assert not matches(condition, node), condition


def test_the_table_has_every_pool_and_its_room(make_config: Callable[..., RunConfig]) -> None:
    rows = {row.role: row for row in pool_table(make_config("pools.rollout.resources={rollout: 1}"))}
    assert rows.keys() == {"learner", "rollout", "prm", "orm"}
    assert rows["rollout"].demand("CPU") == pytest.approx(0.2)
    assert rows["rollout"].room_on({"CPU": 1.0, "rollout": 3.0}, {}) == 3
    assert rows["rollout"].room_on({"CPU": 1.0}, {}) == 0
    assert rows["learner"].room_on({"CPU": 0.35}, {}) == 3


def test_the_report_is_for_people_and_for_programs() -> None:
    findings = [Finding("disk", "node-1", "FAIL", "full", "make room"), Finding("token", "cluster", "PASS", "asked")]
    lines = as_text(findings).splitlines()
    assert lines[0].split() == ["FAIL", "disk", "node-1", "full"]
    assert lines[1].strip() == "-> make room"
    assert lines[-1] == "1 PASS, 0 WARN, 1 FAIL"
    assert json.loads(as_json(findings))[0] == dataclasses.asdict(findings[0])


def doctor(*arguments: str, address: str) -> tuple[int, list[dict[str, str]], float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "doctor", *arguments, "--json"], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env=environment(RAY_ADDRESS=address),
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), time.monotonic() - began


def test_a_cluster_that_cannot_be_reached_ends_in_a_finding(tmp_path: Path) -> None:
    status, (finding, *_), seconds = doctor(address="127.0.0.1:9")
    assert status == 3
    assert (finding["check"], finding["result"]) == ("cluster", "FAIL")
    assert "127.0.0.1:9" in finding["detail"]
    assert seconds < 60, "15 s of waiting, and imports"


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 << 20, "labels": {"pool": "learner"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, object_store_memory=200 << 20, resources={"rollout": 2}, labels={"pool": "rollout"})
    yield cluster
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.skipif("RAY_ADDRESS" in os.environ, reason="needs a cluster of two nodes of its own")
def test_every_node_of_a_cluster_is_looked_at(
    two_nodes: Any, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    make_config()
    recipe = str(tmp_path / "recipe.yaml")
    fits = ["pools.rollout.resources={rollout: 1}", "pools.learner.labels={pool: learner}"]
    status, findings, _ = doctor(recipe, *fits, address=two_nodes.address)
    by_check: dict[str, list[dict[str, str]]] = {}
    for finding in findings:
        by_check.setdefault(finding["check"], []).append(finding)
    for check in ("versions", "disk", "/dev/shm", "shared folder", "weights"):
        assert len({finding["place"] for finding in by_check[check]}) == 2, check
    assert [finding["result"] for finding in by_check["gloo all-reduce"]] == ["PASS"]
    assert "2 ranks" in by_check["gloo all-reduce"][0]["detail"]
    assert [finding["result"] for finding in by_check["weight transfer"]] == ["PASS"]
    assert status == 0, [finding for finding in findings if finding["result"] == "FAIL"]
    assert not list(tmp_path.glob("**/.doctor-*"))

    status, findings, _ = doctor(recipe, "pools.rollout.resources={rollout: 1}", "pools.rollout.num_actors=3",
                                 "pools.learner.labels={pool: nowhere}", address=two_nodes.address)  # fmt: skip
    failed = {finding["check"] for finding in findings if finding["result"] == "FAIL"}
    assert status == 3
    assert failed == {"pool rollout", "pool learner", "rollout"}
