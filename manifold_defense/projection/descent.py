"""The projection `z* = argmin ‖G(z) − x‖²`, and the exact gradient of its computation.

`project` is what is deployed. `project_exactly` is the same computation as one differentiable
operation: the solver's states, a few latents a step, are kept, and its steps are run backwards one
at a time, so that no more than one step's graph is alive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.projection.solvers import SOLVERS, State
from manifold_defense.projection.starts import starts
from manifold_defense.types import Encoder, Generator, Projection


def project(
    generator: Generator, x: Tensor, config: ProjectionConfig, *, encoder: Encoder | None = None
) -> Projection:
    """Project images (N, C, H, W) in [0, 1] onto the range of `generator`.

    Deterministic, and per image: neither the batch nor the caller's gradient or inference mode
    changes the result (beyond float rounding). The result carries no gradient; see
    `project_exactly` for one that does. Raises ValueError for anything but finite float images of
    the generator's shape in [0, 1]; an empty batch gives an empty projection.
    """
    check_images(x, generator.image_shape)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()  # leaves inference mode
        rows = max(1, config.chunk // config.restarts)
        parts = [_project_chunk(generator, part, config, encoder) for part in x.split(rows)]
    return Projection(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _project_chunk(
    generator: Generator, x: Tensor, config: ProjectionConfig, encoder: Encoder | None
) -> Projection:
    n, restarts = len(x), config.restarts
    with torch.no_grad():
        z = starts(x, generator.latent_dim, config, encoder).flatten(0, 1)
    path = _descend(generator, x.repeat_interleave(restarts, 0), z, config)
    winner = _best_restart(path, n) + restarts * torch.arange(n, device=x.device)
    z = path.z[winner]
    with torch.no_grad():
        image = generator(z)
        error = (image - x).square().flatten(1).mean(1)
    steps = torch.full((n,), config.steps * restarts, device=x.device)
    return Projection(z, image, error, steps)


class _Path:
    """The course of M independent descents: best point and loss, and all states if asked for."""

    def __init__(self, z: Tensor) -> None:
        self.z = z  # (M, D) chosen iterate
        self.loss = z.new_full((len(z),), torch.inf)  # (M,) its summed squared error
        self.index = torch.zeros(len(z), dtype=torch.long, device=z.device)  # (M,) after how many steps
        self.states: list[State] = []

    def offer(self, z: Tensor, loss: Tensor, k: int, *, replace: bool) -> None:
        better = torch.ones_like(loss, dtype=torch.bool) if replace else loss < self.loss
        self.z = torch.where(better.unsqueeze(1), z, self.z)
        self.loss = torch.where(better, loss, self.loss)
        self.index = torch.where(better, k, self.index)


def _descend(
    generator: Generator, x: Tensor, z: Tensor, config: ProjectionConfig, *, record: bool = False
) -> _Path:
    """Run the solver from z (M, D) towards x (M, C, H, W); gradients enabled by the caller."""
    solver = SOLVERS[config.solver]
    path = _Path(z)
    state = solver.init(z, config)
    for k in range(config.steps):
        if record:
            path.states.append(state)
        point = state[0].detach().requires_grad_(True)
        loss = _squared_error(generator, point, x)
        # The loss is summed over problems, never averaged: each descends as if it were alone.
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        loss = loss.detach()
        if config.iterate == "best":
            path.offer(point.detach(), loss, k, replace=False)
        with torch.no_grad():
            state = solver.step(state, *_scaled(loss, gradient, x, solver.mean_loss), k, config)
    with torch.no_grad():
        path.offer(
            state[0], _squared_error(generator, state[0], x), config.steps, replace=config.iterate == "last"
        )
    return path


def _best_restart(path: _Path, n: int) -> Tensor:
    """The restart of least loss for each of n images, (n,); one that diverged never wins."""
    return path.loss.view(n, -1 if n else 1).nan_to_num(nan=torch.inf).argmin(1)


def _squared_error(generator: Generator, z: Tensor, x: Tensor) -> Tensor:
    """`‖G(z) − x‖²` of each row, (M,)."""
    return (generator(z) - x).square().flatten(1).sum(1)


def _scaled(loss: Tensor, gradient: Tensor, x: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    pixels = x.shape[1:].numel() if mean else 1
    return loss / pixels, gradient / pixels


def project_exactly(
    generator: Generator, x: Tensor, config: ProjectionConfig, *, encoder: Encoder | None = None
) -> Tensor:
    """`G(z*(x))` (N, C, H, W) as `project` returns it, differentiable in x through every step.

    This is the true gradient of the deployed computation, the choice among restarts and iterates
    held fixed (it is piecewise constant). Backward costs about four times the forward pass of the
    winning restart; it needs second derivatives of G, and gives first derivatives of the result.
    """
    check_images(x, generator.image_shape)
    parts = []
    for part in x.split(max(1, config.chunk // config.restarts)):
        start = starts(part, generator.latent_dim, config, encoder)
        parts.append(generator(_Unrolled.apply(part, start, generator, config)))
    return torch.cat(parts)


class _Unrolled(torch.autograd.Function):
    """(x (N, C, H, W), starts (N, R, D)) -> z* (N, D), differentiated by running the solver backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, generator: Generator, config: ProjectionConfig) -> Tensor:
        n, restarts = start.shape[:2]
        with torch.enable_grad():
            path = _descend(
                generator, x.repeat_interleave(restarts, 0), start.flatten(0, 1), config, record=True
            )
        choice = _best_restart(path, n)
        winner = choice + restarts * torch.arange(n, device=x.device)
        ctx.generator, ctx.config, ctx.choice, ctx.index = generator, config, choice, path.index[winner]
        ctx.states = [tuple(entry[winner] for entry in state) for state in path.states]
        ctx.save_for_backward(x, start)
        return path.z[winner]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, start = ctx.saved_tensors
        config: ProjectionConfig = ctx.config
        solver = SOLVERS[config.solver]
        grad_x = torch.zeros_like(x)
        # Cotangent of the state after step k; z* is the first entry of the state after `index` steps.
        chosen = (ctx.index == config.steps).unsqueeze(1)
        cotangent: list[Tensor | None] = [torch.where(chosen, grad_z, 0.0)]
        cotangent += [None] * (len(solver.init(grad_z, config)) - 1)
        for k in reversed(range(config.steps)):
            with torch.enable_grad():
                state = tuple(entry.detach().requires_grad_(True) for entry in ctx.states[k])
                image = x.detach().requires_grad_(True)
                loss = _squared_error(ctx.generator, state[0], image)
                (gradient,) = torch.autograd.grad(loss.sum(), state[0], create_graph=True)
                after = solver.step(state, *_scaled(loss, gradient, x, solver.mean_loss), k, config)
            pairs = zip(after, cotangent, strict=True)
            reached = [(e, w) for e, w in pairs if w is not None and e.requires_grad]
            *before, into_x = torch.autograd.grad(
                [e for e, _ in reached],
                (*state, image),
                [w for _, w in reached],
                allow_unused=True,
            )
            if into_x is not None:
                grad_x += into_x
            chosen = (ctx.index == k).unsqueeze(1)
            into_z = before[0] if before[0] is not None else torch.zeros_like(grad_z)
            cotangent = [into_z + torch.where(chosen, grad_z, 0.0), *before[1:]]
        # Through `init` to the start: an L-BFGS state, for one, holds it twice.
        with torch.enable_grad():
            z = start[torch.arange(len(x), device=x.device), ctx.choice].detach().requires_grad_(True)
            pairs = zip(solver.init(z, config), cotangent, strict=True)
            reached = [(e, w) for e, w in pairs if w is not None and e.requires_grad]
        (into_start,) = torch.autograd.grad([e for e, _ in reached], z, [w for _, w in reached])
        grad_start = torch.zeros_like(start)
        grad_start[torch.arange(len(x), device=x.device), ctx.choice] = into_start
        return grad_x, grad_start, None, None


def check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless x is a batch of finite float images of `image_shape` in [0, 1]."""
    if not x.is_floating_point():
        raise ValueError(f"images: expected floats in [0, 1], got {x.dtype}; divide integers by 255")
    if x.dim() != 4 or tuple(x.shape[1:]) != tuple(image_shape):
        c, h, w = image_shape
        raise ValueError(f"images: expected shape (N, {c}, {h}, {w}), got {tuple(x.shape)}")
    if len(x) == 0:
        return
    low, high = torch.aminmax(x.detach())
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("images: expected finite values, got NaN or infinity")
    if low < 0 or high > 1:
        raise ValueError(f"images: expected values in [0, 1], got [{float(low):.4g}, {float(high):.4g}]")
