"""The guided sampling loop, which draws a group of trajectories; it knows no Ray.

At every step the process reward (at guided steps also its gradient) and the velocity are functions of the same state.
The request to the source of process rewards is therefore sent first, and its answer is waited for after the velocity
has been computed: with PRM servers on other GPUs, guidance costs next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from actors.members import Members
from euphonium.config import ProcessRewardConfig, RunConfig
from euphonium.dynamics import StepTable
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import Conditioning
from euphonium.wire.later import Later

Velocity = Callable[[Tensor, float], Tensor]
# Rewards ``[batch]``, and their gradient like the state, None if none was asked for.
Rewarded = tuple[Tensor, Tensor | None]


class ProcessRewardSource(Protocol):
    """Scores states: PRM servers, a model in this process, or an estimate from outcome rewards."""

    def submit(self, k: int, x: Tensor, *, with_gradient: bool) -> Later[Rewarded]:
        """Requests the rewards of states ``[batch, *latent]`` at the noise level of step k.

        ``k = num_steps`` means the final state, at noise level ``sigmas[-1]``.
        """
        ...


# Makes the source of process rewards of a group, from its prompt's conditioning, its step table and its velocity.
SourceFactory = Callable[[Conditioning, StepTable, Velocity], ProcessRewardSource]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is recorded of a group's trajectories.

    Attributes:
        steps: int64 ``[group, K]``, steps whose transitions are kept, for every sample; K = 0 keeps none.
        scored_states: numbers, 0 to ``num_steps``, of the states whose process rewards are needed besides those of
            guided steps.
        guided_mean: whether log-probabilities are taken under the mean with guidance (``objective.kind: standard``) or
            under the mean without it (``distill``).
        keep_gradients: whether the gradients that guided the kept transitions are kept with them.
    """

    steps: Tensor
    scored_states: Collection[int] = ()
    guided_mean: bool = False
    keep_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The trajectories of a group: final samples, kept transitions, process rewards.

    Attributes:
        final: float32 ``[group, *latent]``, the samples.
        states: float32 ``[states, *latent]``, the states of the kept transitions, each once.
        rows: int64 ``[group, K]``, where x_k of each transition is in ``states``; equal for samples that share it.
        next_rows: int64 ``[group, K]``, where x_{k+1} is.
        steps: int64 ``[group, K]``, k of the kept transitions.
        log_probs: float32 ``[group, K]``, log-probabilities of the kept transitions.
        gradients: float32 ``[group, K, *latent]``, reward gradients that enter the mean, or None.
        process_rewards: float32 ``[group, num_steps + 1]``, process rewards of all states, 0 where none was requested;
            None if none was requested at all.
        seconds: time by part: ``velocity``, and ``process_reward`` for waits after the velocity was ready.
    """

    final: Tensor
    states: Tensor
    rows: Tensor
    next_rows: Tensor
    steps: Tensor
    log_probs: Tensor
    gradients: Tensor | None
    process_rewards: Tensor | None
    seconds: dict[str, float]


def initial_noise(
    shape: tuple[int, ...], group_size: int, seed: int, *, shared: bool, device: torch.device
) -> tuple[Tensor, torch.Generator]:
    """Initial states ``[group_size, *shape]``, and the generator of the noise of the steps that follow.

    Both draw on the CPU, so that a seed means the same samples on every device. If ``shared``, all samples of the group
    start from the same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 1 if shared else group_size
    noise = torch.randn((count, *shape), generator=generator)
    return noise.expand(group_size, *shape).clone().to(device), generator


def select_steps(
    table: StepTable,
    group_size: int,
    fraction: float,
    seed: int,
    within: tuple[int, int] | None = None,
    spacing: int = 1,
) -> Tensor:
    """Chooses the trained steps of every sample: a random share of the stochastic ones (DanceGRPO's tau).

    Args:
        table: the sampler.
        group_size: number of samples.
        fraction: the share.
        seed: of the draw.
        within: half-open range of the steps that may be trained (``objective.trained_steps``); None for all.
        spacing: every n-th of these alone may be trained (``objective.trained_every``), from the first on.

    Returns:
        int64 ``[group_size, K]``, each row sorted, K = ceil(fraction * stochastic steps that may be trained).

    Raises:
        ConfigError: no step with noise is in the range.
    """
    candidates = [k for k in table.stochastic_steps if within is None or within[0] <= k < within[1]][::spacing]
    if not candidates:
        raise ConfigError(
            f"objective.trained_steps: none of the steps {within} has noise, and only such steps can be trained; those "
            f"with noise are {table.stochastic_steps}"
        )
    return drawn_steps(candidates, group_size, fraction, seed)


def drawn_steps(candidates: Sequence[int], samples: int, fraction: float, seed: int) -> Tensor:
    """A random share of some steps for every sample, int64 ``[samples, K]``, each row sorted."""
    count = max(1, int(np.ceil(fraction * len(candidates) - 1e-9)))
    draws = np.random.default_rng([seed, 1])
    rows = [np.sort(draws.permutation(np.array(candidates))[:count]) for _ in range(samples)]
    return torch.from_numpy(np.stack(rows)).long()


def state_rows(steps: Tensor, shared: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Where the states of kept transitions are, if each is kept once, sample by sample.

    Args:
        steps: int64 ``[group, K]``, k of the transitions.
        shared: k of the state that all samples share, and which comes first of all; None if they share none.

    Returns:
        Like ``steps``: where x_k is and where x_{k+1} is; and the number of states.

    Example:
        >>> state_rows(torch.tensor([[0, 1], [0, 2]]))  # x_0 x_1 x_2, x_0 x_1 x_2 x_3
        (tensor([[0, 1],
                [3, 5]]), tensor([[1, 2],
                [4, 6]]), 7)
        >>> state_rows(torch.tensor([[0, 1], [0, 2]]), shared=0)  # x_0, x_1 x_2, x_1 x_2 x_3
        (tensor([[0, 1],
                [0, 4]]), tensor([[1, 2],
                [3, 5]]), 6)
    """
    if not steps.numel():
        return steps, steps, 0
    needed = torch.zeros(len(steps), int(steps.max()) + 2, dtype=torch.bool)
    needed.scatter_(1, steps, True).scatter_(1, steps + 1, True)
    first = 0
    if shared is not None and bool(needed[:, shared].any()):
        needed[:, shared] = False
        first = 1
    places = needed.flatten().cumsum(0).view_as(needed) - 1 + first
    if shared is not None:
        places[:, shared] = 0
    return places.gather(1, steps), places.gather(1, steps + 1), int(needed.sum()) + first


def last_shared_state(config: RunConfig, table: StepTable) -> int | None:
    """Number k of the last state that all samples of a group share; None if they do not start alike."""
    if not config.sampler.shared_noise:
        return None
    guidance = config.sampler.guidance
    mixed = guidance is not None and len(set(guidance.strengths)) > 1
    # Noise parts the samples, and so does guidance that pushes some of them further than others.
    return min([table.stochastic_steps[0], *(table.guided_steps if mixed else ())])


def credited_steps(process: ProcessRewardConfig, table: StepTable) -> list[int]:
    """Steps that get a process reward: of those with noise, which alone are trained, all or the guided ones."""
    return [k for k in table.stochastic_steps if process.steps == "all" or k in table.guided_steps]


def scored_states(config: RunConfig, table: StepTable) -> tuple[int, ...]:
    """States whose process rewards the advantages need, besides those at which guidance asks for gradients."""
    process = config.rewards.process
    final = {table.num_steps} if config.scores_final_states else set()
    if process is None or process.weight == 0 or config.advantage.mode == "outcome":
        return tuple(final)
    offsets = {"state": (0,), "next_state": (1,), "progress": (0, 1)}[process.credit]
    return tuple(sorted({k + offset for k in credited_steps(process, table) for offset in offsets} | final))


class Step(NamedTuple):
    """One sampling step of a batch.

    Attributes:
        k: number of the step.
        x: state before it, ``[batch, *latent]``; ``v``, ``gradient``, ``mean`` and ``x_next`` have the same shape.
        v: the network's output.
        gradient: gradient of the process reward, or None where the step is not guided.
        mean: mean of the next state, with guidance.
        x_next: the next state.
        alike: whether all samples are in the same state before the step.
        velocity_s: seconds that the velocity took.
        waited_s: seconds of waiting for the gradient after the velocity was ready.
    """

    k: int
    x: Tensor
    v: Tensor
    gradient: Tensor | None
    mean: Tensor
    x_next: Tensor
    alike: bool
    velocity_s: float
    waited_s: float


@torch.no_grad()
def sample_group(
    table: StepTable,
    velocity: Velocity,
    start: Tensor,
    noise: torch.Generator,
    recording: Recording,
    process_reward: ProcessRewardSource | None = None,
    members: Members | None = None,
) -> Trajectory:
    """Draws a group of trajectories, or some of them, from noise to data.

    Args:
        table: the sampler.
        velocity: the network's output at a state and a time (:attr:`euphonium.dynamics.StepTable.times`).
        start: initial states, float32 ``[group, *latent]``.
        noise: CPU generator of the transitions' noise.
        recording: which transitions and process rewards to keep.
        process_reward: source of process rewards; needed if the table is guided or states are scored.
        members: which samples of the group ``start`` and ``recording`` are of; None for all.

    Returns:
        The trajectories; states and log-probabilities are float32.
    """
    rewards = _ProcessRewards(process_reward, table, recording.scored_states)
    kept = _Transitions(table, recording, start)
    seconds = {"velocity": 0.0, "process_reward": 0.0}
    x = start
    of_members = members or Members.all(len(start))
    for step in _walk(table, velocity, start, rewards, lambda x: of_members.noise(x.shape, noise)):
        kept.add(step)
        seconds["velocity"] += step.velocity_s
        seconds["process_reward"] += step.waited_s
        x = step.x_next
    rewards.ask(table.num_steps, x)
    began = time.perf_counter()
    scores = rewards.of_all_states(len(start))
    seconds["process_reward"] += time.perf_counter() - began
    return Trajectory(
        final=x, states=kept.states, rows=kept.rows, next_rows=kept.next_rows, steps=recording.steps,
        log_probs=kept.log_probs, gradients=kept.gradients, process_rewards=scores, seconds=seconds,
    )  # fmt: skip


@torch.no_grad()
def sample_deterministic(
    table: StepTable, velocity: Velocity, start: Tensor, process_reward: ProcessRewardSource | None = None
) -> Tensor:
    """Draws samples without noise in the steps, as evaluation and the exported model do.

    Args:
        table: a table of the law ``ode``; with guidance, the process-reward gradient is added to the ODE (the paper's
            ``Inference RGG``).
        velocity: as for :func:`sample_group`.
        start: initial states, float32 ``[batch, *latent]``.
        process_reward: source of the gradients; needed if the table is guided.

    Returns:
        The samples, like ``start``.
    """
    x = start
    for step in _walk(table, velocity, start, _ProcessRewards(process_reward, table)):
        x = step.x_next
    return x


def _walk(
    table: StepTable,
    velocity: Velocity,
    x: Tensor,
    rewards: _ProcessRewards,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Yields the steps from a state to the end; without ``noise``, which is drawn like x, every next state is its mean.

    Samples that start alike are one state until noise, or guidance of different strengths, parts them.
    """
    alike = len(x) > 1
    for k in range(table.num_steps):
        alike = alike and bool((x == x[:1]).all())
        rewards.ask(k, x)
        began = time.perf_counter()
        time_k = float(table.times[k])
        v = velocity(x[:1], time_k).expand_as(x) if alike else velocity(x, time_k)
        ready = time.perf_counter()
        gradient = rewards.gradient(k)
        waited = time.perf_counter() - ready
        x_next = mean = table.mean(k, x, v, gradient)
        if noise is not None and float(table.std[k]) > 0:
            x_next = table.sample(k, mean, noise(x).to(x.device))
        yield Step(k, x, v, gradient, mean, x_next, alike, ready - began, waited)
        x = x_next


class _ProcessRewards:
    """Process rewards of a trajectory's states: requested before the velocity is computed, waited for after."""

    def __init__(
        self, source: ProcessRewardSource | None, table: StepTable, scored_states: Collection[int] = ()
    ) -> None:
        self._source = source
        self._states = table.num_steps + 1
        self._guided = set(table.guided_steps)
        self._wanted = self._guided | set(scored_states)
        self._answers: dict[int, Later[Rewarded]] = {}
        if self._wanted and source is None:
            raise ValueError("a guided table or process rewards need a source of process rewards")

    def ask(self, k: int, x: Tensor) -> None:
        """Requests the rewards of state k, if they are needed."""
        if self._source is not None and k in self._wanted:
            self._answers[k] = self._source.submit(k, x, with_gradient=k in self._guided)

    def gradient(self, k: int) -> Tensor | None:
        """The gradient at step k, None if it is not guided; waits for it."""
        return self._answers[k].result()[1] if k in self._guided else None

    def of_all_states(self, group: int) -> Tensor | None:
        """Rewards ``[group, num_steps + 1]``, 0 for states that were not scored; None if none was; waits for them."""
        if not self._wanted:
            return None
        rewards = torch.zeros(group, self._states)
        for k, answer in self._answers.items():
            rewards[:, k] = answer.result()[0].cpu()
        return rewards


class _Transitions:
    """Collects the kept transitions of a group; the tensors are those of :class:`Trajectory`."""

    def __init__(self, table: StepTable, recording: Recording, start: Tensor) -> None:
        self._table = table
        self._recording = recording
        shape = (*recording.steps.shape, *start.shape[1:])
        self._lay_out(start, None)
        self.log_probs = torch.empty(recording.steps.shape)
        self.gradients = torch.zeros(shape) if recording.keep_gradients and table.guided_steps else None

    def _lay_out(self, x: Tensor, shared: int | None) -> None:
        self.rows, self.next_rows, count = state_rows(self._recording.steps, shared)
        self.states = torch.empty((count, *x.shape[1:]))

    def add(self, step: Step) -> None:
        """Keeps a step's transitions, for the samples that have this step among theirs."""
        k, x, v, gradient, mean, x_next, alike, *_ = step
        if not self._recording.steps.numel():
            return
        if alike and k == self._table.stochastic_steps[0]:
            # The last state that they can share, and the first that is kept.
            self._lay_out(x, k)
        rows, columns = torch.nonzero(self._recording.steps == k, as_tuple=True)
        if not len(rows):
            return
        if gradient is not None and not self._recording.guided_mean:
            mean = self._table.mean(k, x, v)
        self.log_probs[rows, columns] = self._table.log_prob(k, x_next, mean)[rows].cpu()
        places = self.rows[rows, columns]
        # Where the step before is kept too, its next state is this state.
        new = ~(self._recording.steps[rows] == k - 1).any(dim=1)
        self.states[places[new]] = x[rows[new]].cpu()
        self.states[self.next_rows[rows, columns]] = x_next[rows].cpu()
        if self.gradients is not None and gradient is not None:
            self.gradients[rows, columns] = gradient[rows].cpu()
