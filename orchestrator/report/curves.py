"""Which charts show a run: the metrics of every section, in the order of a reader's questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.report.figures import Chart, Series
from orchestrator.report.metrics import find_metric
from orchestrator.report.recorded import RecordedRun


@dataclass(frozen=True)
class Curves:
    """Metrics that share a chart where there is one run, and have a chart each where there are several.

    Attributes:
        title: of the shared chart.
        keys: keys of the metrics; ``*`` stands for any name.
        meaning: how to read it; empty takes the declaration of the metrics' own.
        log: whether the vertical axis is logarithmic.
        errors: keys of standard errors, by the key of the metric.
        guides: settings of the recipe that are drawn as lines, by path, and what they mean.
        without: keys that have a chart of their own.
    """

    title: str
    keys: tuple[str, ...]
    meaning: str = ""
    log: bool = False
    errors: Mapping[str, str] | None = None
    guides: Mapping[str, str] | None = None
    without: tuple[str, ...] = ()


# Last parts of keys that a chart's title says already.
PARTS = ("mean", "group_std", "zero_spread_groups", "grad_norm")
# Lines that lie further above a chart's curves would flatten them.
GUIDE_WITHIN = 3.0

SECTIONS: Mapping[str, tuple[Curves, ...]] = {
    "Held-out rewards": (
        Curves("Held-out total", ("eval/total/mean",)),
        Curves("Held-out rewards", ("eval/*/mean",), "Mean on prompts that are never trained on, samples without "
               "noise or guidance.", without=("eval/total/mean",)),
    ),
    "Training rewards": (
        Curves("Rewards of the drawn samples", ("reward/*/mean",), "They include what noise and guidance do, so they "
               "are not the policy's own."),
        Curves("Spread within groups", ("reward/*/group_std",)),
        Curves("Groups without spread", ("advantage/zero_std_groups", "reward/*/zero_spread_groups")),
        Curves("Correlation of rewards within groups", ("correlation/*",)),
        Curves("Lost groups", ("rollout/dropped_groups", "rewards/failures/*", "rewards/missing/*")),
    ),
    "Updates": (
        Curves("Gradient norm", ("policy/grad_norm",), guides={"optimizer.max_grad_norm": "clipped to"}),
        Curves("Gradient norm of every step", ("policy/step/*/grad_norm",), log=True),
        Curves("Loss", ("policy/loss",)),
        Curves("Learning rate", ("policy/learning_rate",)),
        Curves("Divergence from the anchor and the previous policy", ("kl/anchor", "kl/previous"), log=True),
        Curves("Weight of the KL penalty", ("kl/weight",)),
    ),
    "Ratios and clipping": (
        Curves("Rollout against learner: |ratio - 1|", ("policy/ratio_deviation", "policy/ratio_deviation_p99"),
               "Before the first update, on-policy: must be rounding only.", log=True,
               guides={"objective.ratio_alarm": "alarm", "objective.ratio_tolerance": "stops the run"}),
        Curves("Mean importance ratio", ("policy/ratio_mean",)),
        Curves("Clip fraction", ("policy/clip_fraction",)),
        Curves("Error on noised samples", ("policy/denoising_error",)),
        Curves("Pairs whose better sample the policy prefers", ("policy/preference_accuracy",)),
        Curves("Divergence from the behaviour policy", ("policy/approx_kl",), log=True),
        Curves("Spread of the advantages", ("advantage/std",)),
    ),
    "Guidance and process reward": (
        Curves("Guidance gain", ("guidance/gain",), errors={"guidance/gain": "guidance/gain_error"}),
        Curves("Guidance margin", ("guidance/margin",), errors={"guidance/margin": "guidance/margin_error"}),
        Curves("Guidance strength", ("guidance/strength",)),
        Curves("Pairs ordered like the outcome rewards", ("process/pairwise_accuracy", "watch/accuracy"),
               guides={"rewards.watch.min_accuracy": "alarm"}),
        Curves("Process reward", ("process/mean", "process/final_mean")),
        Curves("Refresh of the process reward model", ("process/refresh_accuracy", "process/refresh_loss")),
    ),
    "Pools over time": (
        Curves("Busy share of every pool", ("busy/rollout", "busy/prm", "busy/orm", "busy/learner"),
               "A pool near 1 holds up the others."),
        Curves("Members of every pool", ("pool/rollout", "pool/prm", "pool/orm", "pool/learner")),
        Curves("Seconds of an iteration", ("time/iteration_s", "time/rollout_s", "time/update_s", "time/evaluation_s")),
        Curves("Seconds beside it", ("time/scoring_s", "time/learner_wait_s", "time/weight_sync_s", "time/fetch_s",
                                     "time/publish_s", "time/checkpoint_s", "time/commit_s", "time/prm_refresh_s")),
        Curves("Staleness in versions", ("staleness/mean", "staleness/max")),
        Curves("Groups in the buffer", ("buffer/groups",)),
    ),
}  # fmt: skip


def charts(runs: Sequence[RecordedRun], curves: Curves) -> list[Chart]:
    """The charts of some metrics; none where no run recorded any of them."""
    keys = [key for key in matching(runs, curves.keys) if key not in curves.without]
    if len(runs) == 1:
        series = [one for key in keys if (one := _series(runs[0], key, name_of(key), curves))]
        return [_chart(curves.title, series, curves, keys, runs)] if series else []
    found = []
    for key in keys:
        series = [one for run in runs if (one := _series(run, key, run.name, curves))]
        title = curves.title if len(keys) == 1 else f"{curves.title}: {name_of(key)}"
        found += [_chart(title, series, curves, [key], runs)] if series else []
    return found


def matching(runs: Sequence[RecordedRun], patterns: Sequence[str]) -> list[str]:
    """Keys of all runs that match any of the patterns, in the patterns' order."""
    known = dict.fromkeys(key for run in runs for key in run.keys)
    return [key for pattern in patterns for key in known if re.fullmatch(pattern.replace("*", "[^/]+"), key)]


def name_of(key: str) -> str:
    """What a metric is called in a legend.

    Example:
        >>> [name_of(key) for key in ("reward/icon/mean", "rewards/failures/icon", "policy/grad_norm")]
        ['icon', 'failures icon', 'grad norm']
    """
    parts = key.split("/")[1:] or [key]
    return " ".join(parts[:-1] if len(parts) > 1 and parts[-1] in PARTS else parts).replace("_", " ")


def meaning_of(key: str) -> str:
    """What a metric is declared to mean; empty for one that this version does not know."""
    try:
        return find_metric(key)[0].help
    except KeyError:
        return ""


def _series(run: RecordedRun, key: str, name: str, curves: Curves) -> Series | None:
    x, y = run.series(key)
    error_key = (curves.errors or {}).get(key)
    if not x or error_key is None:
        return Series(name, x, y) if x else None
    errors = dict(zip(*run.series(error_key), strict=True))
    return Series(name, x, y, [errors.get(at, 0.0) for at in x])


def _chart(title: str, series: list[Series], curves: Curves, keys: Sequence[str], runs: Sequence[RecordedRun]) -> Chart:
    lines: dict[float, str] = {}
    for path, meaning in (curves.guides or {}).items():
        values = {run.settings.get(path) for run in runs if run.settings.get(path) is not None}
        most = max(abs(y) for one in series for y in one.y) * GUIDE_WITHIN
        lines |= {value: meaning for value in values if isinstance(value, int | float) and (curves.log or value < most)}
    meaning = curves.meaning or (meaning_of(keys[0]) if len(keys) == 1 else "")
    return Chart(title, series, meaning, curves.log, lines)
