"""Looks the packages of requirements.lock up among the known weaknesses, with pip-audit.

    python deploy/audit_lock.py PIP_AUDIT

It asks PyPI. Status 1 if a package has a weakness. Where PyPI cannot be asked nothing is known: that is said, and is no
failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"
TIMEOUT_S = 300


def not_audited(why: str) -> int:
    """Says that nothing was looked up."""
    sys.stdout.write(f"requirements.lock was NOT looked up among known weaknesses: {why}\n")
    return 0


def main(program: str) -> int:
    """Prints each weakness, with the version that is without it; returns the exit status."""
    if not Path(program).is_file():
        return not_audited(f"{program} is not there; could pip not install it (see above)?")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Every package is pinned: nothing is to be chosen, and nothing to be installed.
        command = [program, "--requirement", str(LOCK), "--no-deps", "--disable-pip", "--progress-spinner", "off",
                   "--format", "json", "--output", str(report)]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return not_audited(f"PyPI has not answered within {TIMEOUT_S} s")
        if not report.is_file():
            # What it raises ends with the reason.
            lines = done.stderr.strip().splitlines() or [f"pip-audit ended with status {done.returncode}"]
            return not_audited(lines[-1][:300])
        packages = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    skipped = [f"{package['name']} ({package['skip_reason']})" for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return not_audited(f"what answers for PyPI knows none of these packages: {', '.join(skipped[:2])}")
    weak = [(package, weakness) for package in packages for weakness in package.get("vulns", [])]
    for package, weakness in weak:
        fixed = ", ".join(weakness["fix_versions"]) or "no version yet"
        sys.stdout.write(f"{package['name']} {package['version']}: {weakness['id']}, without it: {fixed}\n")
    if skipped:
        sys.stdout.write(f"not looked up: {', '.join(skipped)}\n")
    sys.stdout.write(f"requirements.lock: {len(packages) - len(skipped)} packages looked up, {len(weak)} weaknesses\n")
    return 1 if weak else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
