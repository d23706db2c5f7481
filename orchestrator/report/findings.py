"""What stands out in a run's records: alarms, losses, rewards that fell, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from orchestrator.report.advice import advice
from orchestrator.report.recorded import RecordedRun

# Share of groups without any spread, or of dropped ones, above which an iteration's work is mostly lost.
MUCH = 0.25
TOTAL = "eval/total/mean"
# Iterations over which guidance is judged: it may stop to pay.
LATELY = 3


@dataclass(frozen=True)
class Finding:
    """Something to know of a run.

    Attributes:
        kind: how urgent it is.
        text: one or two sentences, with the remedy if there is one.
    """

    kind: Literal["good", "note", "warning"]
    text: str


def findings(run: RecordedRun) -> list[Finding]:
    """What stands out in a run, in the order of a reader's questions."""
    return [*_progress(run), *_held_out(run), *_agreement(run), *_rewards(run), *_guidance(run), *_pools(run)]


def _progress(run: RecordedRun) -> Iterator[Finding]:
    if run.planned is not None and run.done < run.planned:
        yield Finding("note", f"{run.done} of {run.planned} iterations are on record.")


def _held_out(run: RecordedRun) -> Iterator[Finding]:
    x, y = run.series(TOTAL)
    if len(y) < 2:
        yield Finding("note", "Fewer than two evaluations with a total are on record: no progress can be told.")
        return
    best = max(range(len(y)), key=lambda i: y[i])
    gain = f"held-out total {y[0]:.4f} -> {y[-1]:.4f} ({y[-1] - y[0]:+.4f})"
    yield Finding("good" if y[-1] > y[0] else "warning", f"From iteration {x[0]:.0f} to {x[-1]:.0f}: {gain}.")
    if best < len(y) - 1 and y[best] - y[-1] > 0.1 * max(1e-12, y[best] - min(y)):
        yield Finding(
            "warning",
            f"The best evaluation is that of iteration {x[best]:.0f} ({y[best]:.4f}), and the total has fallen since: "
            "if a checkpoint of about then is kept, export that one (checkpoint.keep_every).",
        )
    for key in run.keys:
        if key.startswith("eval/") and key.endswith("/mean") and key != TOTAL:
            values = run.series(key)[1]
            if len(values) > 1 and values[-1] < values[0] - 0.01 * abs(values[0]) and y[-1] > y[0]:
                yield Finding(
                    "warning",
                    f"{key.split('/')[1]} fell from {values[0]:.4f} to {values[-1]:.4f} on held-out prompts while the "
                    "total rose: it is being traded for other rewards; raise its weight, or look at the clips.",
                )
        if key.startswith("eval/") and key.endswith("/missing") and run.series(key)[1]:
            yield Finding("warning", f"{key.split('/')[1]} failed in {len(run.series(key)[1])} evaluation(s).")


def _agreement(run: RecordedRun) -> Iterator[Finding]:
    alarms = sum(run.series("policy/ratio_alarm")[1])
    if alarms:
        yield Finding(
            "warning",
            f"Rollout and learner disagreed on the policy's output in {alarms:.0f} iteration(s) (objective.ratio_alarm)"
            ": look at model.dtype, the attention backends and the weights' version of both sides.",
        )
    clipped = run.recent("policy/clip_fraction")
    if clipped is not None and clipped > 0.9:
        yield Finding(
            "warning",
            f"The clip removed the gradient of {clipped:.0%} of the transitions lately: lower optimizer.learning_rate "
            "or objective.updates_per_iteration, or widen objective.clip_range.",
        )


def _rewards(run: RecordedRun) -> Iterator[Finding]:
    groups, flat = run.recent("rollout/groups"), run.recent("advantage/zero_std_groups")
    if groups and flat and flat / groups > MUCH:
        yield Finding(
            "warning",
            f"In {flat / groups:.0%} of the recent groups no reward had any spread, so they teach nothing: raise "
            "rollout.group_size or sampler.eta, or take harder prompts.",
        )
    dropped = sum(run.series("rollout/dropped_groups")[1])
    if dropped:
        yield Finding("warning", f"{dropped:.0f} group(s) were given up because a reward failed or an actor died.")
    for key in run.keys:
        if key.startswith("rewards/failures/") and (count := sum(run.series(key)[1])):
            yield Finding("warning", f"The reward {key.split('/')[-1]} failed for {count:.0f} group(s).")
    alarms = sum(run.series("watch/alarm")[1])
    if alarms:
        yield Finding(
            "warning",
            f"The process reward no longer ordered the policy's samples as the outcome rewards do in {alarms:.0f} "
            "iteration(s): lower sampler.guidance or rewards.process.weight, or refresh the process reward model.",
        )


def _guidance(run: RecordedRun) -> Iterator[Finding]:
    x, gains = run.series("guidance/gain")
    errors = run.series("guidance/gain_error")[1]
    if not gains or len(errors) != len(gains):
        return
    x, gains, errors = x[-LATELY:], gains[-LATELY:], errors[-LATELY:]
    gain, error = sum(gains) / len(gains), sum(e * e for e in errors) ** 0.5 / len(errors)
    said = (
        f"guided samples beat unguided ones by {gain:.2f} +- {error:.2f} of the spread within groups in iterations "
        f"{x[0]:.0f} to {x[-1]:.0f}, the last ones that compared them"
    )
    if gain > 2 * error:
        yield Finding("good", f"Guidance pays: {said}.")
    else:
        yield Finding("note", f"Guidance does not clearly pay: {said}; see sampler.guidance.control and until.")


def _pools(run: RecordedRun) -> Iterator[Finding]:
    busy = {key.removeprefix("busy/"): run.recent(key) for key in run.keys if key.startswith("busy/")}
    sizes = {key.removeprefix("pool/"): run.recent(key, 1) for key in run.keys if key.startswith("pool/")}
    staleness = run.settings.get("rollout.max_staleness")
    line = advice(
        {role: share for role, share in busy.items() if share is not None},
        {role: int(size) for role, size in sizes.items() if size is not None},
        staleness if isinstance(staleness, int) else 0,
    )
    if line is not None:
        yield Finding("note", f"Pools: {line}.")
