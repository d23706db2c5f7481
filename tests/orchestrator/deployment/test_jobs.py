"""Submitting without a cluster: what is refused, what the dashboard shows, and how endings become exit statuses."""

import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from euphonium.config import RunConfig, dump_config
from euphonium.errors import ConfigError, EuphoniumError, PreflightError
from orchestrator.commands.cli import run_command
from orchestrator.commands.submit import metadata
from orchestrator.deployment import jobs
from orchestrator.deployment.jobs import connect, dashboard_address, follow, outcome, runtime_environment


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(jobs, "REACH_TIMEOUT_S", 1.0)


def test_the_dashboard_is_where_the_option_or_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dashboard_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert dashboard_address(None) == "http://127.0.0.1:8265", "the port of the GCS is none of the dashboard"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert dashboard_address(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert dashboard_address(None) == "http://other:1"
    assert dashboard_address("https://given") == "https://given"
    with pytest.raises(ConfigError, match="--address 'head:8265'"):
        dashboard_address("head:8265")


def test_a_closed_port_ends_in_a_line(
    make_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_config()
    arguments = [str(tmp_path / "recipe.yaml"), "--working-dir", str(tmp_path), "--address", "http://127.0.0.1:9"]
    assert run_command(["submit", *arguments]) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert "no Ray dashboard answers at http://127.0.0.1:9" in line


def test_another_server_is_no_dashboard() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(PreflightError, match="is it Ray's dashboard"):
            connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output_dir=runs"], "output_dir: runs would be inside the job's copy"),
        (["sampler.etaa=1"], "etaa"),
    ],
)
def test_recipes_that_cannot_work_there_are_refused_here(
    overrides: list[str],
    message: str,
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_config()
    assert run_command(["submit", str(tmp_path / "recipe.yaml"), "--working-dir", str(tmp_path), *overrides]) == 2
    assert message in capfd.readouterr().err


def test_a_recipe_outside_the_tree_is_refused(
    make_config: Callable[..., RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_config()
    (tmp_path / "tree").mkdir()
    assert run_command(["submit", str(tmp_path / "recipe.yaml"), "--working-dir", str(tmp_path / "tree")]) == 2
    assert "which is all that is sent" in capfd.readouterr().err


def test_a_job_shows_run_method_and_commit(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config()
    shown = metadata(config, Path("recipe.yaml"), tmp_path)
    assert shown["run"] == "tiny"
    assert shown["method"] == "dance, distill, guided"
    assert "commit" not in shown

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "recipe.yaml")
    git("commit", "-qm", "recipe")
    assert metadata(config, Path("recipe.yaml"), tmp_path)["commit"] == git("rev-parse", "HEAD") + "+changes"
    (tmp_path / ".gitignore").write_text("*\n")
    assert metadata(config, Path("recipe.yaml"), tmp_path)["commit"] == git("rev-parse", "HEAD")
    assert all(isinstance(value, str) for value in shown.values())


def ended(**fields: Any) -> Any:
    """What Ray's client says of a job."""
    info = {"status": "FAILED", "driver_exit_code": None, "error_type": None, "message": "why"} | fields
    return SimpleNamespace(get_job_info=lambda job: SimpleNamespace(**info))


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        *(({"driver_exit_code": code}, code) for code in range(1, 7)),
        ({"driver_exit_code": 127}, 3),
        ({"driver_exit_code": -9}, 5),
        ({"driver_exit_code": 137}, 5),
        ({"error_type": "RUNTIME_ENV_SETUP_FAILURE"}, 3),
        ({"error_type": "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"}, 4),
        ({"error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"}, 4),
    ],
)
def test_a_failed_job_has_the_status_of_its_driver(fields: dict[str, Any], status: int) -> None:
    with pytest.raises(EuphoniumError) as raised:
        outcome(ended(**fields), "job")
    assert raised.value.exit_status == status
    assert "\n" not in str(raised.value)


def test_a_job_that_is_done_or_stopped_is_no_error() -> None:
    outcome(ended(status="SUCCEEDED", driver_exit_code=0), "job")
    outcome(ended(status="STOPPED"), "job")


class Flaky:
    """A dashboard that breaks the connection after some text, and begins anew with the first line, as Ray's does."""

    def __init__(self, *connections: str | None) -> None:
        self.connections = list(connections)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        text = self.connections.pop(0)
        if text is None:
            raise ConnectionRefusedError
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            yield part
        if self.connections:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: not self.connections)


def test_every_line_is_followed_once_however_often_the_connection_breaks() -> None:
    written: list[str] = []
    client: Any = Flaky("one\ntw", None, "one\ntwo\nth", "one", "one\ntwo\nthree\n")
    follow(client, "job", written.append)
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_dashboard_that_is_gone_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOST_TIMEOUT_S", 1.5)
    client: Any = Flaky("one\n", *[None] * 100)
    with pytest.raises(PreflightError, match="goes on from its newest checkpoint"):
        follow(client, "job", lambda text: None)


def test_the_shipped_environment_is_the_one_that_jobs_get() -> None:
    from orchestrator.commands.deployment import ROOT

    assert yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text()) == runtime_environment()


def test_a_resolved_recipe_can_be_submitted_again(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from euphonium.config import load_config

    config = make_config()
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml").output_dir.is_absolute()
