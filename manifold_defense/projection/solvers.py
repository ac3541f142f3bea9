"""Latent optimisers that work on many independent problems at once.

A solver proposes points and is told their losses: `init` turns starts z⁰ (M, D) into a state, a
tuple of tensors with one row a problem whose first entry is the point to evaluate next; `step`
takes the loss (M,) and gradient (M, D) at that point and returns the next state. Both are pure and
differentiable, so the same code runs the deployed filter and its exact gradient. M = images ×
restarts; rows never mix. Where the config asks for a metric, points and gradients are in its
coordinates, in which the Hessian of the squared error is about 2·I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_defense.projection.config import ProjectionConfig

State = tuple[Tensor, ...]


class Solver(NamedTuple):
    init: Callable[[Tensor, ProjectionConfig], State]
    # (state, loss (M,), gradient (M, D), index of the step, config) -> state
    step: Callable[[State, Tensor, Tensor, int, ProjectionConfig], State]
    step_size: float  # used when the config leaves it 0, without a metric
    metric_step_size: float  # and with one
    mean_loss: bool = False  # without a metric, works on the mean over pixels instead of the sum


def _gd_init(z: Tensor, config: ProjectionConfig) -> State:
    return z, torch.zeros_like(z)


def _gd_step(state: State, loss: Tensor, gradient: Tensor, k: int, config: ProjectionConfig) -> State:
    """`v ← 0.7 v + ∇(1/P)‖G(z) − x‖²`, `z ← z − η v`, η a tenth for the last fifth (Defense-GAN)."""
    z, velocity = state
    eta = _step_size(config) * (1.0 if k < 0.8 * config.steps else 0.1)
    velocity = config.momentum * velocity + gradient
    return z - eta * velocity, velocity


def _adam_init(z: Tensor, config: ProjectionConfig) -> State:
    return z, torch.zeros_like(z), torch.zeros_like(z)


def _adam_step(state: State, loss: Tensor, gradient: Tensor, k: int, config: ProjectionConfig) -> State:
    """Adam (Kingma & Ba 2015, algorithm 1), its rate falling linearly to zero.

    The constant stands inside the root, so that the step stays differentiable where the gradient
    is zero.
    """
    z, mean, square = state
    beta1, beta2 = 0.9, 0.99
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient.square()
    eta = _step_size(config) * (1 - k / config.steps)
    scale = torch.sqrt(square / (1 - beta2 ** (k + 1)) + 1e-12)
    return z - eta * mean / (1 - beta1 ** (k + 1)) / scale, mean, square


# Curvature pairs kept, and the share of the predicted decrease that a step must achieve (Armijo).
_MEMORY, _SUFFICIENT = 8, 1e-4


def _lbfgs_init(z: Tensor, config: ProjectionConfig) -> State:
    rows, dim = z.shape
    pairs = z.new_zeros(rows, _MEMORY, dim)
    column = z.new_zeros(rows, 1)
    # trial point, accepted point, its loss and gradient, direction, step length, s, y and 1/(s·y)
    return (
        z,
        z,
        column + torch.inf,
        torch.zeros_like(z),
        torch.zeros_like(z),
        column,
        pairs,
        pairs,
        pairs[..., 0],
    )


def _lbfgs_step(state: State, loss: Tensor, gradient: Tensor, k: int, config: ProjectionConfig) -> State:
    """L-BFGS with backtracking, one evaluation a step for every problem at its own pace.

    A problem whose trial point decreases its loss enough accepts it and draws a new direction
    (Nocedal & Wright 2006, algorithms 7.4 and 7.5); the others shorten their step by a parabola
    through what is known (eq. 3.57). Nobody waits for anybody's line search.
    """
    trial, z, f, g, direction, length, s, y, rho = state
    # What is not a number is as bad as can be: a trial that is to be shortened.
    loss = loss.unsqueeze(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    slope = (g * direction).sum(1, keepdim=True)
    accepted = torch.isfinite(loss) & (loss <= f + _SUFFICIENT * length * slope)

    # Rejected: shorten the step to the parabola's minimum, within [0.1, 0.5] of it.
    excess = torch.where(accepted, torch.ones_like(loss), 2 * (loss - f - length * slope))
    shorter = torch.where(accepted, length, -length * length * slope / excess.clamp(min=1e-12))
    shorter = torch.maximum(torch.minimum(shorter, 0.5 * length), 0.1 * length)

    # Accepted: remember the pair if it is curved upwards, and turn.
    move, change = torch.where(accepted, trial, z) - z, torch.where(accepted, gradient, g) - g
    curvature = (move * change).sum(1, keepdim=True)
    first = torch.isinf(f)
    curved = accepted & ~first & (curvature > 1e-10)
    weight = 1 / torch.where(curved, curvature, torch.ones_like(curvature))
    keep = curved.unsqueeze(2)
    s = torch.where(keep, torch.cat([s[:, 1:], move.unsqueeze(1)], 1), s)
    y = torch.where(keep, torch.cat([y[:, 1:], change.unsqueeze(1)], 1), y)
    rho = torch.where(curved, torch.cat([rho[:, 1:], weight], 1), rho)
    z = torch.where(accepted, trial, z)
    f = torch.where(accepted, loss, f)
    g = torch.where(accepted, gradient, g)
    turned = -_two_loops(g, s, y, rho)
    # Without curvature yet, a first step of length `step_size` at most, or in a metric's coordinates
    # that share of the gradient; then Newton's own.
    steepest = rho[:, -1:] == 0
    size = (g.square().sum(1, keepdim=True) + 1e-24).sqrt()
    longest = torch.ones_like(size) if config.metric != "none" else (1 / size).clamp(max=1.0)
    fresh = torch.where(steepest, longest * _step_size(config), torch.ones_like(size))
    direction = torch.where(accepted, turned, direction)
    length = torch.where(accepted, fresh, shorter)
    return z + length * direction, z, f, g, direction, length, s, y, rho


def _two_loops(gradient: Tensor, s: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    """`H g` for the inverse Hessian estimate of the pairs (M, memory, D); empty pairs have rho 0."""
    q, alphas = gradient, []
    for i in range(_MEMORY - 1, -1, -1):
        alpha = rho[:, i : i + 1] * (s[:, i] * q).sum(1, keepdim=True)
        q = q - alpha * y[:, i]
        alphas.append(alpha)
    newest = (y[:, -1]).square().sum(1, keepdim=True)
    scaled = rho[:, -1:] > 0
    gamma = 1 / torch.where(scaled, rho[:, -1:] * newest, torch.ones_like(newest)).clamp(min=1e-12)
    r = gamma * q
    for i in range(_MEMORY):
        beta = rho[:, i : i + 1] * (y[:, i] * r).sum(1, keepdim=True)
        r = r + s[:, i] * (alphas[_MEMORY - 1 - i] - beta)
    return r


SOLVERS = {
    "gd": Solver(_gd_init, _gd_step, step_size=10.0, metric_step_size=0.15, mean_loss=True),
    "adam": Solver(_adam_init, _adam_step, step_size=0.1, metric_step_size=0.2),
    "lbfgs": Solver(_lbfgs_init, _lbfgs_step, step_size=1.0, metric_step_size=0.5),
}


def _step_size(config: ProjectionConfig) -> float:
    solver = SOLVERS[config.solver]
    return config.step_size or (solver.step_size if config.metric == "none" else solver.metric_step_size)
