"""The metrics of a run, each declared once: key in ``metrics.jsonl``, Prometheus name and meaning; and their endpoint.

The orchestrator's own Prometheus endpoint always has the values of the last iteration. They are also set as Ray metrics
every few seconds, because Ray drops a gauge that has not been set for a while, and an iteration may take minutes.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

PREFIX = "euphonium_"
REPUBLISH_EVERY_S = 5.0


@dataclass(frozen=True)
class Metric:
    """One declared metric.

    Attributes:
        key: key in ``metrics.jsonl``; ``*`` stands for the name of a reward, or for what ``label`` says.
        name: name in Prometheus, without prefix.
        help: its meaning, and how to read it.
        label: in Prometheus, the label that has what stands for ``*``.
    """

    key: str
    name: str
    help: str
    label: str = "reward"


METRICS = (
    Metric("iteration", "iteration", "Iterations done."),
    Metric("policy_version", "policy_version", "Version of the published policy: the iteration that made it."),
    Metric("recorded_at", "recorded_timestamp_seconds", "When this was recorded, in seconds since 1970 (UTC)."),
    Metric("reward/*/mean", "reward_mean", "Mean outcome reward of the iteration's samples."),
    Metric("reward/*/std", "reward_std", "Standard deviation of the reward over the iteration's samples."),
    Metric("reward/*/group_std", "reward_group_std", "Mean spread within a group: what there is to learn from."),
    Metric("reward/*/min", "reward_min", "Smallest value of the reward among the iteration's samples."),
    Metric("reward/*/max", "reward_max", "Largest value of the reward among the iteration's samples."),
    Metric("reward/*/zero_spread_groups", "reward_zero_spread_groups",
           "Groups whose samples all got the same value of this reward, which so teaches nothing there."),
    Metric("correlation/*", "reward_correlation",
           "Pearson correlation within groups of two outcome rewards, named `a_vs_b`; a fall below its usual value "
           "says that one is being raised at the other's expense."),
    Metric("rewards/failures/*", "reward_failures",
           "Groups of the iteration for which this reward could not be had; a lost pool counts for all its rewards."),
    Metric("rewards/missing/*", "reward_missing_groups",
           "Groups of the iteration that are trained on without the score of a reward of weight 0, which failed."),
    Metric("process/mean", "process_reward_mean", "Mean process reward over samples and scored steps."),
    Metric("process/final_mean", "process_reward_final_mean", "Mean process reward of the last scored state."),
    Metric("process/outcome_correlation", "process_outcome_correlation",
           "Correlation within groups of the last process reward with the weighted outcome reward; a fall towards 0 "
           "says that the process reward model no longer knows the policy's samples."),
    Metric("process/pairwise_accuracy", "process_pairwise_accuracy",
           "Share of the pairs within groups with unequal weighted outcome that the last process reward orders alike; "
           "0.5 is guessing."),
    Metric("process/pairs", "process_pairs", "Pairs behind the pairwise accuracy."),
    Metric("watch/accuracy", "watch_accuracy", "Pairwise accuracy averaged over the last rewards.watch.window "
           "iterations."),
    Metric("watch/alarm", "watch_alarm", "1 while that average is below rewards.watch.min_accuracy: the process reward "
           "no longer leads where the outcome rewards point; lower its influence or train it anew."),
    Metric("guidance/gain", "guidance_gain",
           "Weighted outcome of the guided members of a group over that of its unguided ones, in units of the spread "
           "within groups; only with sampler.guidance.strengths."),
    Metric("guidance/gain_error", "guidance_gain_error", "Standard error of that gain over the iteration's groups."),
    Metric("guidance/margin", "guidance_margin",
           "The same of a group's strongest guided members over the next weaker ones, guided or not."),
    Metric("guidance/margin_error", "guidance_margin_error", "Standard error of that margin."),
    Metric("guidance/strength", "guidance_strength",
           "Multiple of the recipe's guidance that the iteration's groups got; only with sampler.guidance.control."),
    Metric("process/refresh_accuracy", "process_refresh_accuracy",
           "Share of pairs of the newest groups that the process reward model ranks as the outcome rewards do, over "
           "all noise levels, before a refresh trains on them."),
    Metric("process/refresh_loss", "process_refresh_loss", "Mean Bradley-Terry loss of a refresh."),
    Metric("process/refresh_pairs", "process_refresh_pairs", "Pairs in the replay of a refresh."),
    Metric("advantage/zero_std_groups", "zero_spread_groups", "Groups in which no outcome reward had any spread."),
    Metric("advantage/std", "advantage_std", "Standard deviation of the advantages."),
    Metric("advantage/skipped_transitions", "skipped_transitions",
           "Transitions of samples with advantage 0: they count in the mean of the loss, and are not computed."),
    Metric("policy/loss", "policy_loss", "Mean loss of the iteration's updates."),
    Metric("policy/ratio_deviation", "ratio_deviation",
           "Mean |ratio - 1| of the learner's to the rollout's probabilities, on-policy and before the first update: "
           "must be rounding only, or rollout and learner disagree."),
    Metric("policy/ratio_deviation_p99", "ratio_deviation_p99", "The same, its 99th percentile."),
    Metric("policy/ratio_alarm", "ratio_alarm",
           "1 while that mean is above objective.ratio_alarm: look at model.dtype, the attention backends and the "
           "weights' version of both sides."),
    Metric("policy/ratio_mean", "ratio_mean", "Mean importance ratio."),
    Metric("policy/clip_fraction", "clip_fraction", "Share of transitions whose gradient the clip removed."),
    Metric("policy/approx_kl", "approx_kl", "Half the mean squared log-ratio to the behaviour policy."),
    Metric("policy/denoising_error", "denoising_error",
           "Mean squared error of the network's output on noised samples, with objective.kind: nft or dpo; a steady "
           "rise says that the policy forgets how to denoise what it draws."),
    Metric("policy/preference_accuracy", "preference_accuracy",
           "Share of the pairs of objective.kind: dpo whose better sample the policy prefers, against the reference."),
    Metric("policy/grad_norm", "grad_norm", "Mean gradient norm before clipping."),
    Metric("policy/step_gradient/*", "step_gradient",
           "Length of the loss's gradient with respect to the network's output, root of its mean square over the "
           "states of a step, by number of the step.", label="step"),
    Metric("policy/learning_rate", "learning_rate", "Learning rate of the last update."),
    Metric("kl/weight", "kl_weight", "Weight of the KL penalty in the last update."),
    Metric("kl/anchor", "kl_anchor", "Mean divergence of the transitions from the anchor policy."),
    Metric("kl/previous", "kl_previous", "Mean estimate of the divergence from the policy that drew the groups."),
    Metric("policy/updates", "updates", "Optimiser steps so far."),
    Metric("policy/transitions", "transitions", "Transitions that the learner computed in the iteration."),
    Metric("rollout/groups", "groups", "Groups trained on in the iteration."),
    Metric("rollout/dropped_groups", "dropped_groups", "Groups given up in the iteration because a reward failed."),
    Metric("rollout/samples", "samples", "Samples drawn in the iteration."),
    Metric("rollout/prm_wait_fraction", "prm_wait_fraction",
           "Share of rollout time spent waiting for the PRM after the velocity was ready; 0 is full overlap."),
    Metric("rollout/reused_fraction", "reused_fraction",
           "Share of the rollout actors' passes that went without the blocks behind the first (rollout.reuse_below)."),
    Metric("buffer/bytes", "buffer_bytes", "Bytes of the groups that were drawn and not yet trained on."),
    Metric("buffer/groups", "buffer_groups", "Groups that were begun and not yet trained on."),
    Metric("staleness/mean", "staleness_mean",
           "Versions by which the iteration's groups lagged behind the policy that they trained, mean."),
    Metric("staleness/max", "staleness_max", "The same, largest; never more than rollout.max_staleness."),
    Metric("busy/rollout", "rollout_busy_fraction", "Share of the rollout actors' time that they drew."),
    Metric("busy/prm", "prm_busy_fraction",
           "Share of the PRM servers' time that they scored, as far as they had reported it: every few seconds."),
    Metric("busy/orm", "orm_busy_fraction", "Share of the ORM servers' time that they scored."),
    Metric("busy/learner", "learner_busy_fraction",
           "Share of the iteration in which the learner group fetched, updated, published or wrote a checkpoint."),
    Metric("achieved/rollout_tflops", "rollout_tflops",
           "TFLOP/s of a rollout actor while it draws groups, waits for process rewards included; with "
           "profile.operations."),
    Metric("achieved/learner_tflops", "learner_tflops",
           "TFLOP/s of a learner rank in its updates; with profile.operations. Recomputed activations count."),
    Metric("achieved/rollout_mfu", "rollout_mfu",
           "The same of a rollout actor over the peak of its GPU in bfloat16, where that is known."),
    Metric("achieved/learner_mfu", "learner_mfu",
           "The same of a learner rank over the peak of its GPU in bfloat16, where that is known."),
    Metric("pool/rollout", "rollout_actors", "Rollout actors at work."),
    Metric("pool/prm", "prm_servers", "PRM servers at work."),
    Metric("pool/orm", "orm_servers", "ORM servers at work."),
    Metric("pool/learner", "learner_ranks", "Ranks of the learner group."),
    Metric("weights/bytes", "weights_bytes", "Bytes of one published policy."),
    Metric("weights/receivers", "weights_receivers",
           "Rollout actors that got the weights by broadcast; 0 when they went through the object store."),
    Metric("time/iteration_s", "iteration_seconds", "Wall time of the iteration."),
    Metric("time/rollout_s", "rollout_seconds", "Drawing and scoring all groups."),
    Metric("time/scoring_s", "scoring_seconds", "Outcome scoring, summed over groups; most of it behind rollouts."),
    Metric("time/update_s", "update_seconds", "All updates of the iteration in the learner group."),
    Metric("time/streamed_s", "streamed_seconds",
           "Of these, what the learner group did while groups of the iteration were still being drawn."),
    Metric("time/prm_refresh_s", "prm_refresh_seconds", "Refreshing the process reward model and handing it out."),
    Metric("time/fetch_s", "fetch_seconds", "Fetching trajectories in the learner group."),
    Metric("time/publish_s", "publish_seconds", "Gathering weights and handing them to the weight store."),
    Metric("time/weight_sync_s", "weight_sync_seconds",
           "Publication of the iteration's weights, and the slowest pull before one of its groups."),
    Metric("time/learner_wait_s", "learner_wait_seconds", "Time that the learner group waited for work."),
    Metric("time/evaluation_s", "evaluation_seconds", "Evaluation on held-out prompts."),
    Metric("time/checkpoint_s", "checkpoint_seconds", "Writing a checkpoint in the learner group."),
    Metric("time/commit_s", "commit_seconds", "Hashing and committing the checkpoint before, beside the training."),
    Metric("eval/*/mean", "evaluation_mean", "Mean outcome reward on held-out prompts, ODE samples."),
    Metric("eval/*/missing", "evaluation_missing",
           "1 if the reward failed in the evaluation and was left out, and with it the total if it has a weight."),
    Metric("eval/total/mean", "evaluation_total_mean", "Weighted mean of the outcome rewards on held-out prompts."),
)  # fmt: skip


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\*", "([a-z0-9_]+)") + "$")


_EXACT = {metric.key: metric for metric in METRICS if "*" not in metric.key}
_PATTERNS = [(_pattern(metric.key), metric) for metric in METRICS if "*" in metric.key]


def find_metric(key: str) -> tuple[Metric, str | None]:
    """The declaration of a key, and what stands for its ``*``, such as the name of a reward, or None.

    Raises:
        KeyError: the metric is not declared.
    """
    if key in _EXACT:
        return _EXACT[key], None
    for pattern, metric in _PATTERNS:
        match = pattern.match(key)
        if match:
            return metric, match[1]
    raise KeyError(f"metric {key!r} is not declared in orchestrator/report/metrics.py")


class PrometheusEndpoint:
    """Serves the latest metrics of a run over HTTP, and republishes them as Ray's metrics from a thread."""

    def __init__(self, run: str, port: int, host: str, rewards: list[str]) -> None:
        from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics, start_http_server

        disable_created_metrics()
        self._run = run
        self._registry = CollectorRegistry()
        self._gauges = {
            metric.name: Gauge(
                PREFIX + metric.name, metric.help, ["run", metric.label] if "*" in metric.key else ["run"],
                registry=self._registry,
            )
            for metric in METRICS
        }  # fmt: skip
        self._values: dict[tuple[Metric, str | None], float] = {}
        server, self._thread = start_http_server(port, host, registry=self._registry)
        self._server = server
        self.address = f"http://{host}:{server.server_port}/metrics"
        self._stop = threading.Event()
        self._republisher = threading.Thread(target=self._republish, name="ray-metrics", daemon=True)
        self._republisher.start()

    def set(self, record: Mapping[str, float]) -> None:
        """Sets the metrics of an iteration."""
        for key, value in record.items():
            metric, part = find_metric(key)
            labels = {"run": self._run} | ({metric.label: part} if part is not None else {})
            self._gauges[metric.name].labels(**labels).set(value)
            self._values[metric, part] = value

    def close(self) -> None:
        """Stops serving."""
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def _republish(self) -> None:
        from ray.util.metrics import Gauge

        gauges: dict[str, Any] = {}
        while not self._stop.wait(REPUBLISH_EVERY_S):
            for (metric, part), value in list(self._values.items()):
                name = metric.name
                tags = {"run": self._run} | ({metric.label: part} if part is not None else {})
                try:
                    if name not in gauges:
                        gauges[name] = Gauge(PREFIX + name, tag_keys=tuple(tags))
                    gauges[name].set(value, tags)
                except Exception:
                    # Ray may be shutting down. The endpoint has the value; training must not fail because of this.
                    log.debug("could not republish %s", name, exc_info=True)
                    return
