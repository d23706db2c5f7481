"""The panels of the Grafana dashboard: which metric is drawn where, and which is not.

The metrics are declared in orchestrator/report/metrics.py; a test holds this layout to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["short", "none", "s", "bytes", "percentunit", "dateTimeFromNow"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        metrics: names of the run's metrics, without prefix.
        cluster: queries of Ray's own metrics of the nodes, by legend.
        unit: Grafana's name of the unit.
        kind: a course over time, or the newest value.
        stacked: whether the series add up.
        logarithmic: whether the axis is logarithmic.
    """

    title: str
    metrics: tuple[str, ...] = ()
    cluster: tuple[tuple[str, str], ...] = ()
    unit: Unit = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Section:
    """Panels under a common heading."""

    title: str
    panels: tuple[Panel, ...]


NODES = "{{instance}}"
SECTIONS = (
    Section("Progress", (
        Panel(title="Iterations", metrics=("iteration",), unit="none", kind="stat"),
        Panel(title="Policy version", metrics=("policy_version",), unit="none", kind="stat"),
        Panel(title="Last record", metrics=("recorded_timestamp_seconds",), unit="dateTimeFromNow", kind="stat"),
        Panel(title="Held-out reward", metrics=("evaluation_total_mean",), kind="stat"),
    )),
    Section("Rewards", (
        Panel(title="Held-out rewards", metrics=("evaluation_mean",)),
        Panel(title="Held-out total", metrics=("evaluation_total_mean",)),
        Panel(title="Rewards of the training samples", metrics=("reward_mean",)),
        Panel(title="Range of the rewards", metrics=("reward_min", "reward_max")),
        Panel(title="Spread within groups", metrics=("reward_group_std",)),
        Panel(title="Spread over samples", metrics=("reward_std",)),
        Panel(title="Groups without spread", metrics=("reward_zero_spread_groups", "zero_spread_groups")),
        Panel(title="Correlation of rewards", metrics=("reward_correlation",)),
        Panel(title="Failed rewards", metrics=("reward_failures", "reward_missing_groups", "evaluation_missing")),
    )),
    Section("Process reward and guidance", (
        Panel(title="Process reward", metrics=("process_reward_mean", "process_reward_final_mean")),
        Panel(title="Does it lead where the outcome points?",
              metrics=("process_pairwise_accuracy", "watch_accuracy", "process_refresh_accuracy"), unit="percentunit"),
        Panel(title="Correlation with the outcome", metrics=("process_outcome_correlation",)),
        Panel(title="What guidance gains", metrics=("guidance_gain", "guidance_gain_error", "guidance_margin",
                                                    "guidance_margin_error")),
        Panel(title="Strength of the guidance", metrics=("guidance_strength",)),
        Panel(title="Refresh", metrics=("process_refresh_loss",)),
    )),
    Section("Policy", (
        Panel(title="Rollout and learner agree", metrics=("ratio_deviation", "ratio_deviation_p99"), logarithmic=True),
        Panel(title="Importance ratio", metrics=("ratio_mean",)),
        Panel(title="Clipped transitions", metrics=("clip_fraction",), unit="percentunit"),
        Panel(title="Divergence", metrics=("approx_kl", "kl_anchor", "kl_previous"), logarithmic=True),
        Panel(title="Error on noised samples", metrics=("denoising_error",)),
        Panel(title="Pairs whose better sample is preferred", metrics=("preference_accuracy",), unit="percentunit"),
        Panel(title="Gradient norm", metrics=("grad_norm",), logarithmic=True),
        Panel(title="Gradient by step", metrics=("step_gradient",), logarithmic=True),
        Panel(title="Loss", metrics=("policy_loss",)),
        Panel(title="Advantages", metrics=("advantage_std",)),
        Panel(title="Learning rate", metrics=("learning_rate",)),
    )),
    Section("Pools", (
        Panel(title="Members at work", metrics=("rollout_actors", "prm_servers", "orm_servers", "learner_ranks"),
              unit="none"),
        Panel(title="Busy", metrics=("rollout_busy_fraction", "prm_busy_fraction", "orm_busy_fraction",
                                     "learner_busy_fraction", "prm_wait_fraction", "reused_fraction"),
              unit="percentunit"),
        Panel(title="Groups", metrics=("groups", "dropped_groups", "buffer_groups"), unit="none"),
        Panel(title="Buffer", metrics=("buffer_bytes",), unit="bytes"),
        Panel(title="Staleness", metrics=("staleness_mean", "staleness_max"), unit="none"),
        Panel(title="Samples and transitions", metrics=("samples", "transitions", "skipped_transitions"), unit="none"),
        Panel(title="TFLOP/s of an actor and of a rank", metrics=("rollout_tflops", "learner_tflops"), unit="none"),
        Panel(title="Share of the GPU's peak (MFU)", metrics=("rollout_mfu", "learner_mfu"), unit="percentunit"),
    )),
    Section("Time", (
        Panel(title="Iteration", metrics=("iteration_seconds", "rollout_seconds", "update_seconds", "scoring_seconds"),
              unit="s"),
        Panel(title="Learner group", metrics=("fetch_seconds", "update_seconds", "publish_seconds",
                                              "checkpoint_seconds", "learner_wait_seconds"), unit="s", stacked=True),
        Panel(title="Learnt while groups were drawn", metrics=("streamed_seconds",), unit="s"),
        Panel(title="Between iterations", metrics=("evaluation_seconds", "commit_seconds", "prm_refresh_seconds",
                                                   "weight_sync_seconds"), unit="s"),
        Panel(title="Published weights", metrics=("weights_bytes",), unit="bytes"),
    )),
    Section("Nodes", (
        Panel(title="GPUs at work", cluster=((f"{NODES} GPU {{{{GpuIndex}}}}", "ray_node_gpus_utilization / 100"),),
              unit="percentunit"),
        Panel(title="GPU memory", cluster=((f"{NODES} GPU {{{{GpuIndex}}}}", "ray_node_gram_used * 1024 * 1024"),),
              unit="bytes"),
        Panel(title="Host memory", cluster=((NODES, "ray_node_mem_used_host / ray_node_mem_total_host"),),
              unit="percentunit"),
        Panel(title="Object store", cluster=(("{{Location}}", "sum by (Location) (ray_object_store_memory)"),),
              unit="bytes"),
        Panel(title="Free disk", cluster=((NODES, "min by (instance) (ray_node_disk_free)"),), unit="bytes"),
        Panel(title="CPUs at work", cluster=((NODES, "ray_node_cpu_utilization / 100"),), unit="percentunit"),
    )),
)  # fmt: skip

LEFT_OUT = {
    "watch_alarm": "an alert; the panel of the accuracy shows the same",
    "ratio_alarm": "an alert; the panel of the deviation shows the same",
    "process_pairs": "how many pairs are behind an accuracy that is drawn",
    "process_refresh_pairs": "how many pairs are behind an accuracy that is drawn",
    "updates": "grows with the iterations, by the same number each",
    "kl_weight": "follows the recipe's schedule",
    "weights_receivers": "the number of rollout actors, or 0",
}
