"""The lock of the environment: renewed by pip itself from packages on this disk, and looked up for weaknesses."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS: dict[str, list[str]] = {"lora": [], "video": ["some_thing>2"], "rewards": [], "assets": [], "dev": []}
PROJECT = {"dependencies": ["torch>=2.10", "Some_Thing<3"], "optional-dependencies": EXTRAS}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A folder of packages that hold nothing but their name, as options of pip."""
    for setting in ("PIP_CONSTRAINT", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def of(*packages: str) -> list[str]:
        for package in packages:
            name, version, *needs = package.split()
            info = f"{name}-{version}.dist-info"
            with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{info}/METADATA", "\n".join(
                    ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}",
                     *(f"Requires-Dist: {need}" for need in needs)]) + "\n")  # fmt: skip
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
        return ["--no-index", "--find-links", str(tmp_path)]

    return of


def test_all_but_torch_is_renewed(index: Callable[..., list[str]]) -> None:
    options = index("torch 2.13.0+cpu needed", "torch 2.14.0", "needed 1.5", "needed 1.6", "some_thing 2.9",
                    "some_thing 3.0", "setuptools 80.0")  # fmt: skip
    old = "# What this is.\nneeded==1.0\ngone==2\ntorch==2.13.0\n"
    text = script("renew_lock").renewed(old, PROJECT, options)
    assert text == "# What this is.\nneeded==1.6\nsetuptools==80.0\nsome_thing==2.9\ntorch==2.13.0\n"


def test_an_index_for_gpus_is_refused(index: Callable[..., list[str]]) -> None:
    options = index("torch 2.13.0 nvidia_cublas triton", "nvidia_cublas 13", "triton 3", "some_thing 2.9",
                    "setuptools 1")  # fmt: skip
    module = script("renew_lock")
    with pytest.raises(module.LockError, match=r"is for CUDA, with nvidia.cublas, triton.*PIP_OPTIONS='--index-url"):
        module.renewed("torch==2.13.0\n", PROJECT, options)
    with pytest.raises(module.LockError, match="pins no torch"):
        module.renewed("numpy==2\n", PROJECT, options)


def test_where_pip_finds_no_versions_the_lock_stays(
    index: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, lock = script("renew_lock"), tmp_path / "requirements.lock"
    lock.write_text("torch==2.13.0\n")
    monkeypatch.setattr(module, "LOCK", lock)
    assert "the lock is as it was" in str(module.main(index("torch 2.12.0")))
    assert lock.read_text() == "torch==2.13.0\n"


def test_the_extras_are_there_and_the_present_lock_has_their_packages() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    module = script("renew_lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(Requirement(line).name) for line in module.requirements(project)}
    locked = {canonicalize_name(name) for name in module.versions(module.LOCK.read_text())}
    assert wanted <= locked
    assert not [name for name in locked if module.CUDA.fullmatch(name)]


def audited(tmp_path: Path, program: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and output where something else stands in the place of pip-audit."""
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(f"#!{sys.executable}\nimport sys\n{program}")
    stand_in.chmod(0o755)
    return script("audit_lock").main(str(stand_in)), capfd.readouterr().out


def report(*packages: dict[str, Any]) -> str:
    text = json.dumps({"dependencies": list(packages), "fixes": []})
    return f"open(sys.argv[sys.argv.index('--output') + 1], 'w').write({text!r})\n"


def test_weaknesses_fail_and_name_their_remedy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = {"name": "numpy", "version": "2.4.6", "vulns": []}
    weak = {"name": "old", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
    own = {"name": "ours", "skip_reason": "not on PyPI"}
    status, said = audited(tmp_path, report(good, weak, own) + "sys.exit(1)", capfd)
    assert (status, said.splitlines()) == (1, [
        "old 1.0: PYSEC-1, without it: 1.1", "not looked up: ours (not on PyPI)",
        "requirements.lock: 2 packages looked up, 1 weaknesses"])  # fmt: skip
    assert audited(tmp_path, report(good), capfd)[0] == 0


def test_what_could_not_be_looked_up_is_said_and_is_no_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, said = audited(tmp_path, "sys.exit('Traceback\\nConnectionError: no route to PyPI')", capfd)
    assert (status, said) == (
        0, "requirements.lock was NOT looked up among known weaknesses: ConnectionError: no route to PyPI\n"
    )  # fmt: skip
    # A mirror that has packages and no weaknesses.
    status, said = audited(tmp_path, report({"name": "numpy", "skip_reason": "not found"}), capfd)
    assert (status, "was NOT looked up" in said, "numpy (not found)" in said) == (0, True, True)
    assert script("audit_lock").main(str(tmp_path / "missing")) == 0
    assert "is not there" in capfd.readouterr().out
