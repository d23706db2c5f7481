"""A plan as plain text, at most 100 columns wide."""

from __future__ import annotations

import textwrap

from orchestrator.plan.fit import RoleFit
from orchestrator.plan.hardware import GB, GIB, Hardware
from orchestrator.plan.plan import Plan
from orchestrator.plan.timing import IterationTime

WIDTH = 100
NAMES = {
    "rollout": "rollout actor", "prm": "PRM server", "prm_refresh": "PRM refresh", "orm": "ORM server",
    "learner": "learner rank",
}  # fmt: skip
# Items smaller than this are summed up as others.
SMALL_GIB = 0.5


def table(plan: Plan) -> str:
    """The whole plan."""
    lines = [f"{plan.name}: {plan.model}", *_header(plan), *_chosen(plan), "", *_memory(plan), "", *_work(plan)]
    if plan.time is not None:
        lines += ["", *_times(plan, plan.time)]
    lines += ["", *_verdict(plan)]
    return "\n".join(lines)


def summary(plan: Plan) -> dict[str, str]:
    """The plan in a few lines by name, for ``euphonium validate``."""
    lines = {}
    if plan.gpus:
        lines["GiB of a GPU"] = ", ".join(f"{fit.role} {fit.gpu_gib:.1f}" for fit in plan.fits if fit.gpu_gib)
    if plan.shared is not None:
        lines["GiB of a shared GPU"] = f"{plan.shared.needed_gib:.1f} ({plan.shared.roles})"
    fullest = max(plan.nodes, key=lambda node: node.host_gib)
    lines["GiB of a host"] = f"up to {fullest.host_gib:.0f}, of which {fullest.store_gib:.1f} in the object store"
    lines["PFLOP an iteration"] = ", ".join(f"{role} {amount:.4g}" for role, amount in plan.petaflops.items())
    if tail := _tail(plan):
        lines["waves of rollouts"] = tail
    if plan.time is not None:
        lines["estimated iteration"] = (
            f"{duration(plan.time.total)} on {_gpus(plan)} of {plan.hardware.tflops:g} TFLOP/s"
        )
    return lines


def assumptions(hardware: Hardware) -> str:
    """What was assumed of the machines."""
    return textwrap.fill("assumed: " + ", ".join(hardware.stated()), WIDTH, subsequent_indent="  ")


def duration(seconds: float) -> str:
    """``75 s``, ``12.5 min`` or ``3.4 h``.

    >>> [duration(s) for s in (0.25, 75, 750, 12_240)]
    ['0.25 s', '75 s', '12.5 min', '3.4 h']
    """
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _header(plan: Plan) -> list[str]:
    if not plan.gpus:
        return ["no GPU is reserved"]
    filled = plan.hardware.nodes_for(plan.gpus)
    return [
        f"{_gpus(plan)} of {plan.hardware.gpu_gib:g} GiB, on {filled} "
        f"node{'s' if filled > 1 else ''} of {plan.hardware.gpus_per_node} with {plan.hardware.host_gib:g} GiB"
    ]


def _chosen(plan: Plan) -> list[str]:
    lines = (f"{field}: {note}" for field, note in plan.planned.items())
    return [line for long in lines for line in textwrap.wrap(long, WIDTH, subsequent_indent="  ")]


def _gpus(plan: Plan) -> str:
    return f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"


def _memory(plan: Plan) -> list[str]:
    lines = [f"{'memory':<14}{'members':>7}{'GPU GiB':>9}{'host GiB':>10}  of which"]
    for fit in plan.fits:
        gpu = f"{fit.gpu_gib:.1f}" if fit.gpu_gib else "-"
        begin = f"{NAMES[fit.role]:<14}{fit.members:>7}{gpu:>9}{fit.host_gib:>10.1f}  "
        lines += textwrap.wrap(items(fit), WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin))
    if plan.shared is not None:
        shared = (
            f"a GPU that {plan.shared.roles} share: {plan.shared.sampling_gib:.1f} GiB while groups are drawn and "
            f"scored, {plan.shared.learning_gib:.1f} while the learner works"
        )
        if plan.shared.refreshing_gib:
            shared += f", {plan.shared.refreshing_gib:.1f} while the process reward model is refreshed"
        lines += textwrap.wrap(shared, WIDTH, subsequent_indent="  ")
    return lines


def items(fit: RoleFit) -> str:
    """What a process holds, the large items one by one."""
    large = [
        f"{item.name} {item.nbytes / GIB:.1f}{' on the host' if item.on_host else ''}"
        f"{f' ({item.phase})' if item.phase else ''}"
        for item in fit.memory.items
        if item.nbytes >= SMALL_GIB * GIB
    ]
    return "; ".join(large) or "each item below 0.5 GiB"


def _work(plan: Plan) -> list[str]:
    work = plan.work
    guided = f", {work.guided} of them guided" if work.guided else ""
    total = sum(plan.petaflops.values())
    lines = [
        f"an iteration: {work.groups} groups of {work.group_size} samples, {work.steps} steps{guided}; "
        f"{work.groups * work.rows} transitions, {work.updates} update{'s' if work.updates > 1 else ''}",
        *(textwrap.wrap(f"waves of rollouts: {tail}", WIDTH, subsequent_indent="  ") if (tail := _tail(plan)) else []),
        f"{'work':<14}{'PFLOP':>10}{'share':>8}" + (f"{'GPU s':>9}{'busy':>7}" if plan.time else ""),
    ]
    for fit in plan.fits:
        amount = plan.petaflops[fit.role]
        line = f"{fit.role:<14}{amount:>10.4g}{amount / total:>8.0%}"
        if plan.time is not None:
            busy = plan.time.busy[fit.role]
            line += f"{busy:>9.3g}{busy / plan.time.total:>7.0%}"
        lines.append(line)
    store = max(node.store_gib for node in plan.nodes)
    lines += [
        f"trajectories {work.group_bytes / GB:.3g} GB a group, {work.iteration_bytes / GB:.3g} GB an iteration; "
        f"new weights {plan.publication_bytes / GB:.3g} GB",
        f"object store up to {store:.3g} GiB of {plan.hardware.store_gib:.3g}, host memory up to "
        f"{max(node.host_gib for node in plan.nodes):.0f} GiB on a node",
        f"an evaluation: {work.evaluation_samples} samples, {plan.evaluation_petaflops:.3g} PFLOP of sampling",
    ]
    return lines


def _tail(plan: Plan) -> str:
    """What ``rollout.split_tail`` saves, in words; empty without it."""
    work = plan.work
    if work.piece == work.group_size:
        return ""
    (actors,) = (fit.members for fit in plan.fits if fit.role == "rollout")
    tail, whole = work.tail(actors), -(-work.groups // actors)
    if not tail.groups:
        return f"{whole}, with rollout.split_tail as without: no wave of {actors} actors gets shorter"
    return (
        f"{tail.waves:.3g} instead of {whole}: {actors} actors draw the last {tail.groups} of {work.groups} groups in "
        f"{len(tail.parts)} parts each"
    )


def _times(plan: Plan, time: IterationTime) -> list[str]:
    lines = [f"seconds of an iteration, with {plan.split}: {_sum(time)}"]
    if plan.best is not None and plan.best_time is not None and plan.best != plan.split:
        lines.append(f"shortest with the same GPUs, with {plan.best}: {_sum(plan.best_time)}")
    return [line for long in lines for line in textwrap.wrap(long, WIDTH, subsequent_indent="  ")]


def _sum(time: IterationTime) -> str:
    refresh = f", refresh {time.refresh:.3g}" if time.refresh else ""
    return (
        f"rollout {time.rollout:.3g}, scoring {time.scoring:.3g}, fetch {time.fetch:.3g}, update {time.update:.3g} "
        f"(collectives {time.exposed:.3g}){refresh}, publish {time.publish:.3g}: {duration(time.total)}"
    )


def _verdict(plan: Plan) -> list[str]:
    if not plan.problems:
        return ["it fits"]
    lines = [f"does not fit: {problem}" for problem in plan.problems]
    return [line for long in lines for line in textwrap.wrap(long, WIDTH, subsequent_indent="  ")]
