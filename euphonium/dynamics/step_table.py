"""Every sampler as one table of numbers per step.

A sampling step is a Gaussian whose mean is linear in the state, the velocity and the reward gradient::

    x_{k+1} ~ N(mean_k, std_k^2 I),   mean_k = a_k x_k + b_k v_k + g_k grad_x r(x_k, sigma_k)

so a sampler *is* the numbers ``a, b, std, g``. They are computed once, in float64, by the law (laws.py) and the
guidance (guidance.py); sampling, log-probability and the temporal equaliser read the table.

Diffusion models that predict the noise fit the same form, with their output in the place of the velocity.

Conventions: ``sigma`` is the noise fraction, falling from 1 (noise) to 0 (data); ``x_sigma = (1 - sigma) x0 +
sigma eps``; the velocity is ``v = eps - x0``; step k leads from ``sigma_k`` to ``sigma_{k+1} = sigma_k - delta_k``.
``std`` is always the standard deviation of the transition, never a diffusion coefficient.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from euphonium.dynamics.guidance import Guidance, checked_window
from euphonium.dynamics.laws import LAWS, Columns, StepTableError, check_steps, checked_grid, law_ddim, law_ode


@dataclass(frozen=True, eq=False)
class StepTable:
    """The numbers of one sampler; made by :meth:`build` or, for models that predict the noise, by :meth:`build_ddim`.

    Attributes:
        law: name of the law.
        sigmas: float64 ``[num_steps + 1]``, noise levels: the noise fraction of flow matching, and
            ``sqrt(1 - alpha_bar)`` of diffusion.
        times: float64 ``[num_steps]``, the network's time input at each step, as a fraction of its range.
        predicts_noise: whether the network's output is the noise instead of the velocity.
        coef_x: float64 ``[num_steps]``, a_k.
        coef_v: float64 ``[num_steps]``, b_k.
        std: float64 ``[num_steps]``, standard deviation of the transition.
        coef_grad: float64 ``[num_steps]``, g_k.

    Example:
        >>> table = StepTable.build("dance", torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), eta=0.5)
        >>> table.std.tolist()  # eta sqrt(delta)
        [0.25, 0.25, 0.25, 0.25]
        >>> x, v = torch.zeros(2, 3), torch.ones(2, 3)
        >>> mean = table.mean(0, x, v)
        >>> x_next = table.sample(0, mean, torch.randn(2, 3))
        >>> table.log_prob(0, x_next, mean).shape
        torch.Size([2])
    """

    law: str
    sigmas: Tensor
    times: Tensor
    predicts_noise: bool
    coef_x: Tensor
    coef_v: Tensor
    std: Tensor
    coef_grad: Tensor

    @classmethod
    def build(
        cls,
        law: str,
        sigmas: Tensor,
        *,
        eta: float | None = None,
        guidance: Guidance | None = None,
        sde_window: tuple[int, int] | None = None,
        times: Tensor | None = None,
    ) -> StepTable:
        """Computes the table of a law on a grid.

        Args:
            law: a key of ``LAWS``.
            sigmas: ``[num_steps + 1]``, strictly falling from at most 1 to at least 0.
            eta: noise level > 0 of the stochastic laws; ``cps`` takes at most 1; ``ode`` takes none.
            guidance: reward-gradient guidance; composes with every law.
            sde_window: half-open range of steps that follow the law; the others are steps of the ODE (MixGRPO).
                ``(0, num_steps - 1)`` ends on the predicted data instead of on data plus noise.
            times: ``[num_steps]``, the network's time input at each step, as a fraction of its range; None for the
                noise levels themselves.

        Raises:
            StepTableError: an unknown law, a grid or noise level outside its range, or a step whose variance is
                not positive or whose numbers are not finite; the message names the step.
        """
        if law not in LAWS:
            raise StepTableError(f"unknown law {law!r}; known are {', '.join(LAWS)} (and ddim, see build_ddim)")
        grid = checked_grid(sigmas)
        if law == "ode":
            if eta is not None:
                raise StepTableError("the law 'ode' is deterministic and takes no eta")
        elif eta is None or not (eta > 0 and math.isfinite(eta)):
            raise StepTableError(f"the law {law!r} needs eta > 0, got {eta}")
        elif law == "cps" and eta > 1:
            raise StepTableError(f"the law 'cps' needs eta in (0, 1], got {eta}: std is sigma' sin(eta pi/2)")
        columns = _within(sde_window, law, grid, LAWS[law](grid, eta or 0.0), law_ode(grid, 0.0))
        network_times = grid[:-1] if times is None else _checked_times(times, grid)
        return cls._assemble(law, grid, network_times, columns, guidance)

    @classmethod
    def build_ddim(
        cls,
        alphas: Tensor,
        times: Tensor,
        *,
        eta: float | None = None,
        guidance: Guidance | None = None,
        sde_window: tuple[int, int] | None = None,
    ) -> StepTable:
        """Computes the table of DDIM for a model that predicts the noise.

        Args:
            alphas: ``[num_steps + 1]`` cumulative signal products in (0, 1], rising towards data, of the model's own
                schedule.
            times: ``[num_steps]``, the network's time input at each step, as a fraction of its range.
            eta: noise level > 0; None gives the deterministic sampler.
            guidance: as for :meth:`build`; a step's length is the fall of ``sqrt(1 - alpha)``.
            sde_window: as for :meth:`build`.

        Raises:
            StepTableError: as for :meth:`build`.
        """
        rising = torch.as_tensor(alphas, dtype=torch.float64).detach().cpu().clone()
        grid = checked_grid((1 - rising).clamp(min=0).sqrt())
        if eta is not None and not (eta > 0 and math.isfinite(eta)):
            raise StepTableError(f"the law 'ddim' needs eta > 0, got {eta}")
        deterministic = law_ddim(rising, 0.0)
        stochastic = deterministic if eta is None else law_ddim(rising, eta)
        law = "ode" if eta is None else "ddim"
        columns = _within(sde_window, law, grid, stochastic, deterministic)
        table = cls._assemble(law, grid, _checked_times(times, grid), columns, guidance)
        return dataclasses.replace(table, predicts_noise=True)

    @classmethod
    def _assemble(
        cls,
        law: str,
        grid: Tensor,
        times: Tensor,
        columns: Columns,
        guidance: Guidance | None,
    ) -> StepTable:
        delta = grid[:-1] - grid[1:]
        coef_grad = torch.zeros_like(delta) if guidance is None else guidance.coefficients(grid, columns.std**2)
        return cls(law, grid, times, False, *columns, coef_grad)

    @property
    def num_steps(self) -> int:
        """Number of sampling steps T."""
        return self.std.shape[0]

    @property
    def stochastic_steps(self) -> list[int]:
        """Steps with noise: the only ones that have a likelihood and can be trained."""
        return [k for k in range(self.num_steps) if float(self.std[k]) > 0]

    @property
    def guided_steps(self) -> list[int]:
        """Steps at which the reward gradient enters the mean."""
        return [k for k in range(self.num_steps) if float(self.coef_grad[k]) != 0]

    def mean(self, k: int | Tensor, x: Tensor, v: Tensor, reward_gradient: Tensor | None = None) -> Tensor:
        """Mean of the transition, ``a_k x + b_k v + g_k grad``.

        Args:
            k: step, or steps ``[batch]`` (int64), one a sample.
            x: states ``[batch, ...]``.
            v: velocities, like ``x``.
            reward_gradient: ``grad_x r(x_k, sigma_k)``, like ``x``; None scores or samples without guidance.

        Returns:
            float32, like ``x``.
        """
        x, v = x.float(), v.float()
        mean = _pick(self.coef_x, k, x) * x + _pick(self.coef_v, k, x) * v
        if reward_gradient is not None:
            mean = mean + _pick(self.coef_grad, k, x) * reward_gradient.float()
        return mean

    def sample(self, k: int, mean: Tensor, noise: Tensor) -> Tensor:
        """Next state ``mean + std_k noise``; float32, like ``mean``."""
        return mean + _pick(self.std, k, mean) * noise.float()

    def predicted_data(self, k: int | Tensor, x: Tensor, v: Tensor) -> Tensor:
        """The network's estimate of the clean sample: one deterministic step to noise level 0.

        Args:
            k: step, or steps ``[batch]``, one a sample.
            x: states ``[batch, ...]``.
            v: the network's outputs, like ``x``.

        Returns:
            float32, like ``x``.
        """
        x, v = x.float(), v.float()
        noise = _pick(self.sigmas, k, x) * v
        return (x - noise) / _pick(self._signal, k, x) if self.predicts_noise else x - noise

    def noised(self, k: int | Tensor, data: Tensor, noise: Tensor) -> Tensor:
        """Clean samples at the noise level of step k, by the forward process; float32, like ``data``."""
        data = data.float()
        return _pick(self._signal, k, data) * data + _pick(self.sigmas, k, data) * noise.float()

    def output_for(self, k: int | Tensor, x: Tensor, data: Tensor) -> Tensor:
        """The output of a network whose :meth:`predicted_data` is ``data``: what it is trained on; float32."""
        x, data = x.float(), data.float()
        signal = _pick(self._signal, k, x) if self.predicts_noise else 1.0
        return (x - signal * data) / _pick(self.sigmas, k, x)

    @property
    def _signal(self) -> Tensor:
        """Share of the clean sample at every noise level, float64 ``[num_steps + 1]``."""
        return (1 - self.sigmas**2).sqrt() if self.predicts_noise else 1 - self.sigmas

    def log_prob(self, k: int | Tensor, x_next: Tensor, mean: Tensor) -> Tensor:
        """Gaussian log-density of the transition, averaged over all non-batch dimensions.

        The mean, not the sum, is what every public implementation takes and what clip ranges of 1e-4 presume.
        Pass the next state as it is stored: rounding it afterwards shifts the result by more than the clip range.

        Args:
            k: step, or steps ``[batch]``, one a sample.
            x_next: next states ``[batch, ...]``.
            mean: means, like ``x_next``.

        Returns:
            float32 ``[batch]``.

        Raises:
            StepTableError: a step without noise, which has no density.
        """
        steps = [k] if isinstance(k, int) else sorted(set(k.tolist()))
        for step in steps:
            if float(self.std[step]) == 0:
                raise StepTableError(f"step {step} of law {self.law!r} has no noise, so no log-probability")
        std = _pick(self.std, k, mean)
        z = (x_next.float() - mean.float()) / std
        density = -0.5 * z.square() - torch.log(torch.as_tensor(std, dtype=torch.float32)) - _HALF_LOG_2PI
        return density.flatten(1).mean(dim=1)

    def kl(self, k: int | Tensor, mean: Tensor, reference: Tensor) -> Tensor:
        """KL divergence of two transitions of this law, averaged over all non-batch dimensions.

        Both have the variance V_k, so it is ``mean((mean - reference)^2) / (2 V_k)`` in either direction.

        Args:
            k: step, or steps ``[batch]``, one a sample.
            mean: means ``[batch, ...]`` under one policy.
            reference: under the other.

        Returns:
            float32 ``[batch]``.
        """
        std = _pick(self.std, k, mean)
        return ((mean.float() - reference.float()) / std).square().flatten(1).mean(dim=1) / 2

    def equaliser(self) -> Tensor:
        """Temporal gradient equaliser of SAGE-GRPO (Eq. 9): ``S_k = median(N) / N_k`` with ``N_k = |b_k| / std_k``.

        ``N_k`` is the length of the log-probability's gradient with respect to the velocity, per unit of noise. The
        median (the lower one of two) is over the stochastic steps.

        Returns:
            float64 ``[num_steps]``, 1 at steps without noise.
        """
        stochastic = self.std > 0
        norms = self.coef_v.abs()[stochastic] / self.std[stochastic]
        scale = torch.ones_like(self.std)
        scale[stochastic] = norms.median() / norms
        return scale

    def rectifier(self) -> Tensor:
        """Temporal gradient rectification of Flash-GRPO: ``1 / N_k`` over its mean, with the equaliser's ``N_k``.

        Its mean over the stochastic steps is 1: where one of them is drawn, updates keep their length on average.

        Returns:
            float64 ``[num_steps]``, 1 at steps without noise.
        """
        stochastic = self.std > 0
        inverse = self.std[stochastic] / self.coef_v.abs()[stochastic]
        scale = torch.ones_like(self.std)
        scale[stochastic] = inverse / inverse.mean()
        return scale

    def fingerprint(self) -> str:
        """Hash of all numbers of the table: two processes with equal fingerprints use the same sampler."""
        digest = hashlib.sha256(self.law.encode())
        for tensor in (self.sigmas, self.times, self.coef_x, self.coef_v, self.std, self.coef_grad):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _pick(column: Tensor, k: int | Tensor, like: Tensor) -> Tensor:
    """Numbers of step(s) ``k`` in float32, shaped to broadcast over ``like``."""
    chosen = column[k].to(device=like.device, dtype=torch.float32)
    return chosen.reshape(chosen.shape + (1,) * (like.dim() - chosen.dim()))


def _checked_times(times: Tensor, grid: Tensor) -> Tensor:
    """Copies the network's times to float64 on the CPU; raises StepTableError if they are not one a step."""
    copied = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
    if copied.shape != (len(grid) - 1,):
        raise StepTableError(f"times must have shape [{len(grid) - 1}], got {list(copied.shape)}")
    return copied


def _within(
    window: tuple[int, int] | None, law: str, grid: Tensor, columns: Columns, deterministic: Columns
) -> Columns:
    """The law's numbers in the window and the deterministic ones elsewhere, checked."""
    start, stop = checked_window("sde_window", window, len(grid) - 1)
    inside = torch.zeros(len(grid) - 1, dtype=torch.bool)
    inside[start:stop] = True
    mixed = Columns(*(torch.where(inside, column, ode) for column, ode in zip(columns, deterministic, strict=True)))
    check_steps(law, grid, mixed, range(start, stop))
    return mixed
