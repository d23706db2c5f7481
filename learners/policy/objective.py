"""The objective on micro-batches: clipped GRPO of transitions with all its options, or a loss of noised samples.

Euphonium's Eq. 17-19 and 53-58, SAGE-GRPO's equaliser and dual KL, GRPO-Guard's ratio normalisation; DiffusionNFT and
Diffusion-DPO. Everything here is a function of one micro-batch; what it knows of samplers it reads from the step table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from euphonium.config import KlConfig, ObjectiveConfig, RunConfig
from euphonium.dynamics import StepTable
from euphonium.dynamics.forward_process import dpo_loss, dpo_margin, nft_loss, optimality
from euphonium.dynamics.kl import k3_estimate, log_ratio_estimate
from euphonium.generators.conditioning import Conditioning

Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Rows of one micro-batch, each a transition of one sample, or a sample that was noised again.

    Attributes:
        states: float32 ``[states, *latent]``, the states that the rows leave, each once.
        of: int64 ``[rows]``, which of the states is x_k of a row; None if row i leaves state i.
        next_states: float32 ``[rows, *latent]``, x_{k+1}; of a noised sample, the sample itself.
        steps: int64 ``[rows]``, k.
        log_probs: float32 ``[rows]``, log-probabilities under the behaviour policy.
        advantages: float32 ``[components, rows]``; each component has a clipped loss of its own.
        gradients: float32 like ``next_states``, reward gradients that guided the steps, or None.
        conditioning: conditioning of the states.
        weight: weight of a row in the loss; 0 in micro-batches that only keep the ranks in step.
        own_old: whether ratios divide by the learner's own present probabilities instead of ``log_probs``, which are
            then only compared with.
        guided_mean: whether the gradients belong to the mean (``objective.kind: standard``).
    """

    states: Tensor
    next_states: Tensor
    steps: Tensor
    log_probs: Tensor
    advantages: Tensor
    gradients: Tensor | None
    conditioning: Conditioning
    weight: float
    own_old: bool = False
    guided_mean: bool = True
    of: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class References:
    """Frozen policies that the objective compares with, and the weight of the KL penalty.

    Attributes:
        anchor: velocity of the KL penalty's anchor, or None.
        previous: velocity of the policy that drew the rows; None where that is the current one, which has not been
            updated since, or where log-probabilities suffice.
        kl_weight: lambda_KL of this update.
    """

    anchor: Velocity | None = None
    previous: Velocity | None = None
    kl_weight: float = 0.0


class OutputGradients:
    """How long the gradient of the loss with respect to the network's output is, by step.

    Backward passes fill it in, so it costs none. Lengths are those of a row of weight 1; where rows share a state, of
    their sum. Where ranks share samples, a rank's loss and so this gradient is theirs times as much as a row's.

    Attributes:
        squares: float64 ``[num_steps]``, sum of the squared lengths.
        states: float64 ``[num_steps]``, number of the states behind them.
    """

    def __init__(self, num_steps: int, sharing: int = 1) -> None:
        """Creates it; ``sharing`` is the number of ranks that share a sample."""
        self._sharing = sharing
        self.squares = torch.zeros(num_steps, dtype=torch.float64)
        self.states = torch.zeros(num_steps, dtype=torch.float64)

    def watch(self, output: Tensor, steps: Tensor, weight: float) -> None:
        """Notes the gradient of an output ``[states, ...]`` at ``steps`` once it is there; rows have this weight."""
        if not output.requires_grad or weight == 0:
            return

        def note(gradient: Tensor) -> None:
            squares = gradient.detach().float().flatten(1).square().sum(dim=1).double().cpu()
            squares /= (weight * self._sharing) ** 2
            self.squares.index_add_(0, steps.cpu(), squares)
            self.states.index_add_(0, steps.cpu(), torch.ones_like(squares))

        output.register_hook(note)


@dataclass(frozen=True, kw_only=True)
class ObjectiveValue:
    """Loss of a micro-batch, and statistics of its rows.

    Attributes:
        loss: scalar, the weighted sum over rows.
        ratio: ``[rows]``, importance ratios, detached.
        deviation: ``[rows]``, |ratio - 1| to the probabilities that the rows came with, detached.
        clipped: ``[rows]`` in [0, 1], share of the components whose gradient the clip removes.
        kl_anchor: ``[rows]`` divergence from the anchor, detached; zeros without one.
        kl_previous: ``[rows]`` estimate of the divergence from the behaviour policy, detached; zeros without one.
        error: ``[rows]``, of noised samples the mean squared error of the network's output, detached; else zeros. The
            ratios of noised samples are 1.
        preferred: ``[rows]``, 1 where the better sample of a row's pair is the one that the policy prefers, relative to
            the reference; zeros without pairs.
    """

    loss: Tensor
    ratio: Tensor
    deviation: Tensor
    clipped: Tensor
    kl_anchor: Tensor
    kl_previous: Tensor
    error: Tensor
    preferred: Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate loss ``-min(w A, clip(w, 1 - c, 1 + c) A)``.

    Args:
        ratio: importance ratios w, ``[rows]``.
        advantages: A, ``[components, rows]``.
        clip_range: c.

    Returns:
        Losses like ``advantages``, and bool where the clip is active, so that there is no gradient.

    Example:
        >>> ratio, advantages = torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor([[-1.0, 1.0, -1.0, 1.0]])
        >>> loss, clipped = clipped_surrogate(ratio, advantages, clip_range=0.25)
        >>> loss.tolist()
        [[0.75, -0.5, 2.0, -1.25]]
        >>> clipped.tolist()  # only where the policy has already moved far enough in the advantage's direction
        [[True, False, False, True]]
    """
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    free, held = ratio * advantages, bounded * advantages
    return -torch.minimum(free, held), (held < free) & (bounded != ratio)


def step_weights(config: ObjectiveConfig, table: StepTable) -> Tensor:
    """Weight of each step in the loss, float64 ``[num_steps]``."""
    if config.step_weights == "equaliser":
        return table.equaliser()
    if config.step_weights == "rectified":
        return table.rectifier()
    weights = torch.ones_like(table.std)
    if config.step_weights == "inverse_delta":
        stochastic = table.std > 0
        inverse = 1 / (table.sigmas[:-1] - table.sigmas[1:])
        weights[stochastic] = inverse[stochastic] / inverse[stochastic].mean()
    return weights


def evaluate_objective(
    config: ObjectiveConfig,
    table: StepTable,
    velocity: Velocity,
    rows: Transitions,
    references: References | None = None,
    gradients: OutputGradients | None = None,
) -> ObjectiveValue:
    """The objective of one micro-batch under the current policy.

    Args:
        config: kind of objective and its options.
        table: the sampler that drew the rows.
        velocity: the current policy's velocity, differentiable in its parameters.
        rows: the micro-batch.
        references: frozen policies; the anchor is needed for the penalty that has one and for the pairs of ``dpo``, the
            previous policy from an iteration's second update on.
        gradients: takes note of the gradient with respect to the network's output.

    Raises:
        ValueError: ``dpo`` without an anchor.
    """
    references = references or References()
    if config.noises_samples:
        return _evaluate_noised(config, table, velocity, rows, references, gradients)
    mean, log_prob = _score(table, velocity, rows, gradients)
    deviation = torch.expm1(log_prob.detach() - rows.log_probs).abs()
    old_log_prob = log_prob.detach() if rows.own_old else rows.log_probs
    log_ratio = log_prob - old_log_prob
    previous_mean = mean.detach()
    if references.previous is not None:
        with torch.no_grad():
            previous_mean, _ = _score(table, references.previous, rows)
    if config.ratio_normalisation:
        # GRPO-Guard: off policy the log-ratio of a Gaussian step has mean -KL and a spread of 1 / std_k.
        std = table.std[rows.steps].to(log_ratio)
        log_ratio = std * (log_ratio + table.kl(rows.steps, mean, previous_mean))
    ratio = torch.exp(log_ratio)
    losses, clipped = clipped_surrogate(ratio, rows.advantages, config.clip_range)
    weights = step_weights(config, table)[rows.steps].to(ratio)
    total = weights * losses.sum(dim=0)

    kl_anchor, kl_previous = torch.zeros_like(ratio), torch.zeros_like(ratio)
    if config.kl is not None:
        if references.anchor is not None:
            kl_anchor = _anchor_divergence(table, references.anchor, rows, mean)
        if config.kl.previous != "none":
            kl_previous = _previous_divergence(
                config.kl, table, rows.steps, (mean, log_prob), (previous_mean, old_log_prob)
            )
        penalty = config.kl.anchor_weight * kl_anchor + config.kl.previous_weight * kl_previous
        # A penalty is added to a loss that is minimised; the sign of SAGE-GRPO's Eq. 43 is a slip.
        total = total + references.kl_weight * penalty
    if config.imitate_guidance and rows.gradients is not None:
        strength = table.coef_grad[rows.steps].to(mean).view(-1, *[1] * (mean.dim() - 1))
        guided = (mean + strength * rows.gradients).detach()
        total = total + config.imitate_guidance * table.kl(rows.steps, mean, guided)
    return ObjectiveValue(
        loss=rows.weight * total.sum(),
        ratio=ratio.detach(),
        deviation=deviation,
        clipped=clipped.float().mean(dim=0),
        kl_anchor=kl_anchor.detach(),
        kl_previous=kl_previous.detach(),
        error=torch.zeros_like(deviation),
        preferred=torch.zeros_like(deviation),
    )


def _evaluate_noised(
    config: ObjectiveConfig,
    table: StepTable,
    velocity: Velocity,
    rows: Transitions,
    references: References,
    gradients: OutputGradients | None,
) -> ObjectiveValue:
    """The objective of noised samples; the divergence of two policies is the mean square between their outputs."""
    states, output = _output(table, velocity, rows, gradients)
    with torch.no_grad():
        old, anchor = (
            None if policy is None else _output(table, policy, rows)[1]
            for policy in (references.previous, references.anchor)
        )
    old = output.detach() if old is None else old
    none = torch.zeros(len(output), device=output.device)
    target = table.output_for(rows.steps, states, rows.next_states)
    error, preferred = _mean_square(output, target), none
    kl_anchor = none if anchor is None else _mean_square(output, anchor)
    if config.kind == "dpo":
        if anchor is None:
            raise ValueError("dpo needs its reference, the anchor")
        advantages = rows.advantages.sum(dim=0)
        beta = references.kl_weight * (config.kl.anchor_weight if config.kl is not None else 1.0)
        margins = dpo_margin(error, _mean_square(anchor, target), advantages, beta)
        total = dpo_loss(margins).repeat_interleave(2)
        preferred = (margins.detach() > 0).float().repeat_interleave(2)
    else:
        predicted, before = (table.predicted_data(rows.steps, states, v) for v in (output, old))
        span = config.nft.advantage_range
        good = optimality(rows.advantages, span)
        total = span * nft_loss(rows.next_states.float(), predicted, before, good, config.nft.mixture).sum(dim=0)
        if config.kl is not None:
            total = total + references.kl_weight * config.kl.anchor_weight * kl_anchor
    return ObjectiveValue(
        loss=rows.weight * total.sum(), ratio=torch.ones_like(none), deviation=none, clipped=none,
        kl_anchor=kl_anchor.detach(), kl_previous=_mean_square(output, old).detach(), error=error.detach(),
        preferred=preferred,
    )  # fmt: skip


def _mean_square(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().flatten(1).mean(dim=1)


def _anchor_divergence(table: StepTable, anchor: Velocity, rows: Transitions, mean: Tensor) -> Tensor:
    """KL divergence of the rows' transitions from the anchor's, ``[rows]``."""
    with torch.no_grad():
        anchor_mean, _ = _score(table, anchor, rows)
    return table.kl(rows.steps, mean, anchor_mean)


def _previous_divergence(
    kl: KlConfig, table: StepTable, steps: Tensor, score: tuple[Tensor, Tensor], previous: tuple[Tensor, Tensor]
) -> Tensor:
    """Estimate of the KL divergence from the policy that drew the rows, ``[rows]``, by the method ``kl.previous``.

    Args:
        kl: settings of the penalty.
        table: the sampler.
        steps: k of the rows.
        score: means and log-probabilities under the current policy.
        previous: the same under the policy that drew the rows; the means only where the method needs them.
    """
    mean, log_prob = score
    previous_mean, old_log_prob = previous
    if kl.previous == "log_ratio":
        return log_ratio_estimate(log_prob, old_log_prob)
    if kl.previous == "k3":
        return k3_estimate(log_prob, old_log_prob)
    return table.kl(steps, mean, previous_mean)


def _score(
    table: StepTable, velocity: Velocity, rows: Transitions, gradients: OutputGradients | None = None
) -> tuple[Tensor, Tensor]:
    """Means and log-probabilities of the rows under a policy."""
    states, v = _output(table, velocity, rows, gradients)
    mean = table.mean(rows.steps, states, v, rows.gradients if rows.guided_mean else None)
    return mean, table.log_prob(rows.steps, rows.next_states, mean)


def _output(
    table: StepTable, velocity: Velocity, rows: Transitions, gradients: OutputGradients | None = None
) -> tuple[Tensor, Tensor]:
    """The states that the rows leave, and the network's outputs there under a policy, in float32."""
    states, steps = rows.states, rows.steps
    if rows.of is not None:
        # All rows of a state are of the same step.
        steps = steps.new_zeros(len(states)).scatter_(0, rows.of.to(steps.device), steps)
    v = velocity(states, table.times[steps].to(device=states.device, dtype=torch.float32), rows.conditioning)
    if gradients is not None:
        gradients.watch(v, steps, rows.weight)
    if rows.of is not None and len(rows.of) > len(states):
        states, v = states[rows.of], v[rows.of]
    return states.float(), v.float()


@torch.no_grad()
def replayed_log_probs(table: StepTable, velocity: Velocity, rows: Transitions) -> Tensor:
    """Log-probabilities of the rows under a policy, without gradients."""
    return _score(table, velocity, rows)[1]


OldLogProbs = Literal["own", "replay", "rollout"]


def old_log_probs(config: RunConfig, update: int, *, on_policy: bool) -> OldLogProbs:
    """Where the old log-probabilities of a group's rows come from (``objective.old_log_probs``).

    Args:
        config: configuration of the run.
        update: number of the update in its iteration, from 0.
        on_policy: whether the group was drawn by the policy that the iteration began with.

    Returns:
        ``own``: the learner's at this very update, which is the first; ``replay``: the learner's before the first
        update, in a pass of their own; ``rollout``: those that the rows came with.
    """
    wanted = config.objective.old_log_probs
    # Noised samples have none, and so nothing to compute.
    if not on_policy or wanted == "rollout" or config.objective.noises_samples:
        return "rollout"
    if update == 0:
        return "own"
    return "rollout" if wanted == "auto" and config.model.dtype == "float32" else "replay"
