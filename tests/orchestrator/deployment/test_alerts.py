"""Prometheus itself checks the configuration and the rules, and runs the rules on series that should and should not
alert. Its ``promtool`` is in Debian's package ``prometheus``; EUPHONIUM_PROMTOOL may name it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator.commands.deployment import ROOT
from orchestrator.deployment.alerts import ALERTS, rules
from orchestrator.report.metrics import PREFIX

PROMTOOL = os.environ.get("EUPHONIUM_PROMTOOL") or shutil.which("promtool")
pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here: apt-get install prometheus")
RUN = 'run="a"'
ICON = 'reward="icon", run="a"'


def promtool(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], cwd=cwd, text=True, capture_output=True, timeout=60)


def series(name: str, values: str, labels: str = RUN) -> dict[str, str]:
    full = name if name.startswith(("ray_", "up")) else PREFIX + name
    return {"series": f"{full}{{{labels}}}", "values": values}


# By alert: the series, a value a minute, that make it fire at the given minute, and such that do not.
FIRES = {
    "RunGone": (10, [series("up", "1 0x10", 'job="euphonium", run="a"')]),
    "NoIteration": (50, [series("recorded_timestamp_seconds", "0x60"), series("iteration_seconds", "300x60")]),
    "RatioDeviates": (1, [series("ratio_alarm", "1x5")]),
    "GroupsDropped": (20, [series("groups", "6x30"), series("dropped_groups", "2x30")]),
    "RewardFails": (20, [series("reward_failures", "1x30", ICON)]),
    "NothingToLearn": (40, [series("zero_spread_groups", "9x60"), series("groups", "10x60")]),
    "ProcessRewardMisleads": (1, [series("watch_alarm", "1x5")]),
    "HeldOutRewardFalls": (70, [series("evaluation_total_mean", "0.8x30 0.5x60")]),
    "EvaluationIncomplete": (1, [series("evaluation_missing", "1x5", ICON)]),
    "RolloutPoolShrunk": (20, [series("rollout_actors", "4x5 3x30")]),
    "PrmPoolShrunk": (20, [series("prm_servers", "4x5 3x30")]),
    "OrmPoolShrunk": (20, [series("orm_servers", "4x5 3x30")]),
    "LearnerPoolShrunk": (20, [series("learner_ranks", "4x5 3x30")]),
    "LearnerIdle": (70, [series("learner_busy_fraction", "0.2x80")]),
    "WaitsForProcessReward": (40, [series("prm_wait_fraction", "0.4x60")]),
    "NodeMemory": (5, [series("ray_node_mem_used_host", "95x10", 'instance="n"'),
                       series("ray_node_mem_total_host", "100x10", 'instance="n"')]),
    "NodeDisk": (20, [series("ray_node_disk_free", "4x30", 'instance="n"'),
                      series("ray_node_disk_usage", "96x30", 'instance="n"')]),
}  # fmt: skip
QUIET = {
    "RunGone": (10, [series("up", "1x10", 'job="euphonium", run="a"')]),
    # Ten minutes an iteration: half an hour without one is no reason to call.
    "NoIteration": (45, [series("recorded_timestamp_seconds", "0x60"), series("iteration_seconds", "600x60")]),
    "RatioDeviates": (1, [series("ratio_alarm", "0x5")]),
    "GroupsDropped": (20, [series("groups", "8x30"), series("dropped_groups", "0x30")]),
    "RewardFails": (10, [series("reward_failures", "1x30", ICON)]),
    "NothingToLearn": (40, [series("zero_spread_groups", "5x60"), series("groups", "10x60")]),
    "ProcessRewardMisleads": (1, [series("watch_alarm", "0x5")]),
    "HeldOutRewardFalls": (70, [series("evaluation_total_mean", "-0.8x30 -0.85x60")]),
    "EvaluationIncomplete": (1, [series("evaluation_missing", "0x5", ICON)]),
    "RolloutPoolShrunk": (20, [series("rollout_actors", "3x5 4x30")]),
    "PrmPoolShrunk": (20, [series("prm_servers", "4x30")]),
    "OrmPoolShrunk": (90, [series("orm_servers", "4x5 3x90")]),
    "LearnerPoolShrunk": (20, [series("learner_ranks", "4x30")]),
    "LearnerIdle": (70, [series("learner_busy_fraction", "0.5x80")]),
    "WaitsForProcessReward": (40, [series("prm_wait_fraction", "0.1x60")]),
    "NodeMemory": (5, [series("ray_node_mem_used_host", "60x10", 'instance="n"'),
                       series("ray_node_mem_total_host", "100x10", 'instance="n"')]),
    "NodeDisk": (20, [series("ray_node_disk_free", "40x30", 'instance="n"'),
                      series("ray_node_disk_usage", "60x30", 'instance="n"')]),
}  # fmt: skip


def case(name: str, minute: int, inputs: list[dict[str, str]], *, fires: bool) -> dict[str, object]:
    """A test of one alert on series. Labels and texts are Prometheus' own to fill in: how many fire is asked for."""
    query = {
        "expr": f'count(ALERTS{{alertname="Euphonium{name}", alertstate="firing"}})',
        "eval_time": f"{minute}m",
        "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
    }
    return {"name": name, "interval": "1m", "input_series": inputs, "promql_expr_test": [query]}


def run_cases(folder: Path, tests: list[dict[str, object]]) -> subprocess.CompletedProcess[str]:
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules()))
    cases = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "cases.yml").write_text(yaml.safe_dump(cases))
    return promtool("test", "rules", "cases.yml", cwd=folder)


def test_every_alert_has_its_cases() -> None:
    names = {alert.name for alert in ALERTS}
    assert FIRES.keys() == names
    assert QUIET.keys() == names


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    done = run_cases(tmp_path, [case(name, *given, fires=True) for name, given in FIRES.items()])
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_stay_quiet_when_they_should(tmp_path: Path) -> None:
    done = run_cases(tmp_path, [case(name, *given, fires=False) for name, given in QUIET.items()])
    assert done.returncode == 0, done.stdout + done.stderr


def test_cases_that_do_not_hold_are_noticed(tmp_path: Path) -> None:
    done = run_cases(tmp_path, [case("RatioDeviates", *QUIET["RatioDeviates"], fires=True)])
    assert done.returncode != 0


def test_prometheus_takes_configuration_and_rules() -> None:
    done = promtool("check", "config", "deploy/monitoring/prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_promtool_would_notice_a_typo(tmp_path: Path) -> None:
    text = (ROOT / "deploy/monitoring/alerts.yml").read_text()
    for right, wrong in (("expr:", "exp:"), ("max_over_time(", "maxovertime("), ("for: 5m", "for: 5 minutes")):
        assert right in text
        (tmp_path / "alerts.yml").write_text(text.replace(right, wrong, 1))
        assert promtool("check", "rules", "alerts.yml", cwd=tmp_path).returncode != 0


def test_the_texts_of_alerts_are_filled_in(tmp_path: Path) -> None:
    remedy = next(alert.remedy for alert in ALERTS if alert.name == "RewardFails")
    expected = {
        "exp_labels": {"severity": "warning", "run": "a", "reward": "icon"},
        "exp_annotations": {"summary": "Reward icon of a fails in every iteration.", "description": remedy},
    }
    asked = {"eval_time": "20m", "alertname": "EuphoniumRewardFails", "exp_alerts": [expected]}
    inputs = [series("reward_failures", "1x30", ICON)]
    done = run_cases(tmp_path, [{"interval": "1m", "input_series": inputs, "alert_rule_test": [asked]}])
    assert done.returncode == 0, done.stdout + done.stderr
