"""One group in detail: what is known of every transition of every sample, as a table and as a picture.

The learner's side is computed by the rollout worker's own transformer, this time with gradients, step by step; KL
penalty and ratio normalisation, which need further policies, are left out of the loss.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from euphonium.config import ObjectiveConfig, RunConfig
from euphonium.config.base import chosen
from euphonium.dynamics import StepTable
from euphonium.generators.conditioning import Conditioning
from euphonium.rewards.total import weighted_total
from euphonium.wire.arrays import as_tensor
from euphonium.wire.records import TrainingGroup
from learners.policy.objective import Transitions, Velocity, clipped_surrogate, evaluate_objective, step_weights
from orchestrator.debug.drawing import Drawer, DrawnGroup
from orchestrator.debug.training import credited
from orchestrator.report.pictures import Video, contact_sheet


@dataclass(frozen=True)
class Transition:
    """A row of the table: step ``k`` of one sample.

    Attributes:
        sample: number of the sample in its group.
        step: k.
        sigma: noise level before the step.
        std: standard deviation of the step's noise.
        state_rms: root mean square of x_k.
        process_reward: what the action is credited with; 0 without one.
        outcome: weighted total of the sample's outcome rewards.
        advantage: sum over the components.
        log_prob_rollout: log-probability that the rollout recorded.
        ratio: the learner's probability over the rollout's.
        weight: of the step in the loss.
        loss: clipped surrogate of the transition, weighted.
        step_grad_norm: norm of the gradient of the mean loss over all transitions of this step.
    """

    sample: int
    step: int
    sigma: float
    std: float
    state_rms: float
    process_reward: float
    outcome: float
    advantage: float
    log_prob_rollout: float
    ratio: float
    weight: float
    loss: float
    step_grad_norm: float


def inspect_group(config: RunConfig, drawer: Drawer, drawn: DrawnGroup) -> list[Transition]:
    """The table of a group that the drawer's policy drew, by sample and step."""
    (group,), _ = credited(config, [drawn])
    table = drawer.worker.table(drawn.info.task.iteration)
    objective = config.objective.model_copy(update={"kl": None, "ratio_normalisation": False})
    totals = weighted_total(drawn.scores, config.rewards.outcome, len(drawn.latents))
    process, weights = drawn.info.process_rewards, step_weights(config.objective, table)
    found = []
    for k in np.unique(drawn.payload.steps[group.samples]).tolist():
        samples, columns = _rows_of_step(group, drawn, k)
        rows = _transitions(drawer, group, drawn, (samples, columns), k, objective)
        ratio, norm = _replayed(drawer, objective, table, rows, config)
        losses, _ = clipped_surrogate(ratio, rows.advantages.cpu(), objective.clip_range)
        for i, sample in enumerate(samples.tolist()):
            found.append(Transition(
                sample=sample, step=k, sigma=float(table.sigmas[k]), std=float(table.std[k]),
                state_rms=float(rows.states[i].square().mean().sqrt()),
                process_reward=0.0 if process is None else float(process[sample, k]), outcome=float(totals[sample]),
                advantage=float(rows.advantages[:, i].sum()), log_prob_rollout=float(rows.log_probs[i]),
                ratio=float(ratio[i]), weight=float(weights[k]), loss=float(weights[k] * losses[:, i].sum()),
                step_grad_norm=norm,
            ))  # fmt: skip
    return sorted(found, key=lambda row: (row.sample, row.step))


Place = tuple[NDArray[np.int64], NDArray[np.int64]]


def _rows_of_step(group: TrainingGroup, drawn: DrawnGroup, k: int) -> Place:
    """Samples that train step k, and in which column of the payload each has it."""
    which, columns = np.nonzero(drawn.payload.steps[group.samples] == k)
    samples: NDArray[np.int64] = np.asarray(group.samples[which], dtype=np.int64)
    return samples, columns.astype(np.int64)


def _transitions(
    drawer: Drawer, group: TrainingGroup, drawn: DrawnGroup, place: Place, k: int, objective: ObjectiveConfig
) -> Transitions:
    payload, device, count = drawn.payload, drawer.worker.device, len(place[0])

    def taken(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Transitions(
        states=taken(payload.states[payload.rows[place]]), next_states=taken(payload.states[payload.next_rows[place]]),
        steps=torch.full((count,), k, dtype=torch.int64), log_probs=taken(payload.log_probs[place]),
        advantages=taken(group.advantages[:, place[0], k]),
        gradients=None if payload.gradients is None else taken(payload.gradients[place]),
        conditioning={name: as_tensor(array).to(device) for name, array in payload.conditioning.items()},
        weight=1.0 / count, guided_mean=objective.kind == "standard",
    )  # fmt: skip


def _replayed(
    drawer: Drawer, objective: ObjectiveConfig, table: StepTable, rows: Transitions, config: RunConfig
) -> tuple[Tensor, float]:
    """Ratios of all rows of a step, and the norm of the gradient of their mean loss."""
    from euphonium.generators.conditioning import expand

    trained = list(drawer.worker.published.values())
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = None
    size = chosen(config.pools.learner.rows_per_micro_batch, "pools.learner.rows_per_micro_batch")
    ratios = []
    try:
        for begin in range(0, len(rows.states), size):
            part = slice(begin, begin + size)
            batch = Transitions(
                states=rows.states[part], next_states=rows.next_states[part], steps=rows.steps[part],
                log_probs=rows.log_probs[part], advantages=rows.advantages[:, part],
                gradients=None if rows.gradients is None else rows.gradients[part],
                conditioning=expand(rows.conditioning, len(rows.states[part])), weight=rows.weight,
                guided_mean=rows.guided_mean,
            )  # fmt: skip
            value = evaluate_objective(objective, table, _velocity(drawer), batch)
            value.loss.backward()
            ratios.append(value.ratio.cpu())
        squares = [float(p.grad.float().square().sum()) for p in trained if p.grad is not None]
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    return torch.cat(ratios), float(np.sqrt(sum(squares)))


def _velocity(drawer: Drawer) -> Velocity:
    family, model = drawer.worker.family, drawer.worker.transformer

    def velocity(x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return family.velocity(model, x, time, conditioning)

    return velocity


def write_table(transitions: Sequence[Transition], file: Path) -> None:
    """Writes the table as CSV."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(Transition)])
        writer.writerows(astuple(transition) for transition in transitions)


def write_picture(drawer: Drawer, drawn: DrawnGroup, transitions: Sequence[Transition], file: Path) -> None:
    """Draws the decoded states of every sample, a row a sample: those that trained steps leave, then the result."""
    payload = drawn.payload
    finals = drawer.scorer.videos(drawn.latents)
    rows = []
    for sample in sorted({transition.sample for transition in transitions}):
        of_sample = [transition for transition in transitions if transition.sample == sample]
        columns = np.argsort(payload.steps[sample])
        states = drawer.scorer.videos(payload.states[payload.rows[sample, columns]])
        clips = [
            (f"k={row.step} A={row.advantage:+.2f}", _middle(video))
            for row, video in zip(of_sample, states, strict=True)
        ]
        clips.append((f"result {of_sample[0].outcome:.2f}", _middle(finals[sample])))
        rows.append((f"sample {sample}", clips))
    contact_sheet(rows, shown_frames=1).save(file)


def _middle(video: Video) -> Video:
    frame = len(video) // 2
    return video[frame : frame + 1]


def by_step(transitions: Sequence[Transition]) -> list[str]:
    """A line for each step, for people to read."""
    lines = [f"{'step':>4} {'sigma':>7} {'std':>7} {'|ratio-1|':>10} {'|A|':>7} {'process':>8} {'grad norm':>10}"]
    for k in sorted({transition.step for transition in transitions}):
        rows = [transition for transition in transitions if transition.step == k]
        ratio = sum(abs(row.ratio - 1) for row in rows) / len(rows)
        advantage = sum(abs(row.advantage) for row in rows) / len(rows)
        process = sum(row.process_reward for row in rows) / len(rows)
        lines.append(
            f"{k:>4} {rows[0].sigma:>7.4f} {rows[0].std:>7.4f} {ratio:>10.2e} {advantage:>7.3f} {process:>8.3f} "
            f"{rows[0].step_grad_norm:>10.3e}"
        )
    return lines
