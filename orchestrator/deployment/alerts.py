"""Prometheus' alert rules for runs and their nodes, each with what to do.

``run`` is the label of a run's own metrics; ``instance`` that of a node in Ray's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from orchestrator.report.metrics import PREFIX

JOB = "euphonium"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One rule.

    Attributes:
        name: its name, without the project's.
        query: fires where this has a value; ``m:`` stands for the prefix of the run's metrics.
        held: how long it must hold first.
        severity: ``critical`` where the run does no good any more, ``warning`` where somebody should look, ``info``
            where GPUs could be used better.
        summary: what is the case.
        remedy: what to do.
    """

    name: str
    query: str
    held: str = "0m"
    severity: Literal["critical", "warning", "info"] = "warning"
    summary: str
    remedy: str

    @property
    def expression(self) -> str:
        """The query as Prometheus takes it."""
        return " ".join(self.query.replace("m:", PREFIX).split())


_AGE = "time() - m:recorded_timestamp_seconds"
ALERTS = (
    Alert(
        name="RunGone", query=f'up{{job="{JOB}"}} == 0', held="5m", severity="critical",
        summary="Run {{ $labels.run }} does not answer any more.",
        remedy="It was killed, or its node is lost; a run that ends by itself signs off. Start the same command again: "
        "with resume=auto it goes on from its newest checkpoint.",
    ),
    Alert(
        name="NoIteration",
        query=f"({_AGE} > 1800) unless on (run) ({_AGE} <= 5 * m:iteration_seconds)",
        held="5m", severity="critical",
        summary="Run {{ $labels.run }} has recorded nothing for {{ $value | humanizeDuration }}.",
        remedy="euphonium status says what it waits for: a pool that has no room, a reward server that does not "
        "answer, a learner group that restarts.",
    ),
    Alert(
        name="RatioDeviates", query="m:ratio_alarm == 1", severity="critical",
        summary="Learner and rollout of {{ $labels.run }} disagree about the same probabilities.",
        remedy="Look at model.dtype, the attention backends and the weights' version of both sides; nothing that is "
        "trained meanwhile can be relied on.",
    ),
    Alert(
        name="GroupsDropped", query="m:dropped_groups / (m:groups + m:dropped_groups) > 0.2", held="15m",
        severity="critical",
        summary="{{ $value | humanizePercentage }} of the groups of {{ $labels.run }} are given up.",
        remedy="Rewards fail: look at the reward servers' logs in Ray's dashboard, and at rewards.deadline_s.",
    ),
    Alert(
        name="RewardFails", query="m:reward_failures > 0", held="15m",
        summary="Reward {{ $labels.reward }} of {{ $labels.run }} fails in every iteration.",
        remedy="Look at the logs of the ORM servers in Ray's dashboard, and at rewards.outcome[].on_failure.",
    ),
    Alert(
        name="NothingToLearn", query="m:zero_spread_groups / m:groups > 0.8", held="30m",
        summary="{{ $value | humanizePercentage }} of the groups of {{ $labels.run }} have equal rewards.",
        remedy="They teach nothing. Take harder prompts, more noise (sampler.eta), or a reward that tells samples "
        "apart.",
    ),
    Alert(
        name="ProcessRewardMisleads", query="m:watch_alarm == 1",
        summary="The process reward of {{ $labels.run }} no longer leads where its outcome rewards point.",
        remedy="Lower rewards.process.weight and sampler.guidance.scale, turn on rewards.process.refresh, or train it "
        "anew.",
    ),
    Alert(
        name="HeldOutRewardFalls",
        query="max_over_time(m:evaluation_total_mean[12h]) - m:evaluation_total_mean "
        "> 0.2 * abs(max_over_time(m:evaluation_total_mean[12h]))",
        held="10m",
        summary="The held-out reward of {{ $labels.run }} is {{ $value }} below its best of the last 12 hours.",
        remedy="Look at the clips in samples/, and at divergence and correlations: an optimised reward may be "
        "exploited. Go back to an earlier checkpoint with resume=FOLDER and a smaller learning rate.",
    ),
    Alert(
        name="EvaluationIncomplete", query="m:evaluation_missing == 1",
        summary="Reward {{ $labels.reward }} is missing in the last evaluation of {{ $labels.run }}.",
        remedy="Look at the logs of the ORM servers; the next evaluation asks again.",
    ),
    *(
        Alert(
            name=f"{title}PoolShrunk", query=f"m:{metric} < max_over_time(m:{metric}[1h])", held="10m",
            summary=f"Run {{{{ $labels.run }}}} works with {{{{ $value }}}} {what}, and had more within the hour.",
            remedy=f"If nobody changed it (euphonium scale), members are lost: euphonium status names them, and "
            f"euphonium scale RUN {role}=N brings new ones.",
        )
        for title, metric, what, role in (
            ("Rollout", "rollout_actors", "rollout actors", "rollout"),
            ("Prm", "prm_servers", "PRM servers", "prm"),
            ("Orm", "orm_servers", "ORM servers", "orm"),
            ("Learner", "learner_ranks", "learner ranks", "learner"),
        )
    ),
    Alert(
        name="LearnerIdle", query="m:learner_busy_fraction < 0.3", held="1h", severity="info",
        summary="The learner group of {{ $labels.run }} works {{ $value | humanizePercentage }} of the time.",
        remedy="Add rollout actors (euphonium scale), let rollouts overlap (rollout.max_staleness=1), or give GPUs "
        "from one pool to the other: euphonium plan finds the split.",
    ),
    Alert(
        name="WaitsForProcessReward", query="m:prm_wait_fraction > 0.3", held="30m", severity="info",
        summary="Rollouts of {{ $labels.run }} wait {{ $value | humanizePercentage }} of their time for the PRM.",
        remedy="Add PRM servers: euphonium scale RUN prm=N.",
    ),
    Alert(
        name="NodeMemory", query="ray_node_mem_used_host / ray_node_mem_total_host > 0.93", held="2m",
        summary="Memory of {{ $labels.instance }} is {{ $value | humanizePercentage }} full.",
        remedy="From 95 % on Ray ends workers. Take fewer actors a node, a smaller rollout.buffer_mb, or no "
        "pools.learner.offload_optimizer.",
    ),
    Alert(
        name="NodeDisk",
        query="min by (instance) (ray_node_disk_free) < 0.05 * min by (instance) "
        "(ray_node_disk_free + ray_node_disk_usage)",
        held="10m",
        summary="Less than 5 % of the disk of {{ $labels.instance }} is free.",
        remedy="Objects are spilled and checkpoints written there: make room, or lower checkpoint.keep_last.",
    ),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The rules by Prometheus' fields."""
    return {
        "groups": [
            {
                "name": "euphonium",
                "rules": [
                    {
                        "alert": f"Euphonium{alert.name}",
                        "expr": alert.expression,
                        "for": alert.held,
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "description": alert.remedy},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }


def rules_yaml() -> str:
    """Text of ``deploy/monitoring/alerts.yml``."""
    text = yaml.safe_dump(rules(), sort_keys=False, width=110, allow_unicode=True)
    return f"# Made by python -m orchestrator.commands.deployment; do not edit.\n{text}"
