"""The projection `z* = argmin loss(G(z) − x)`, and the exact gradient of its computation.

`project` is what is deployed. `project_exactly` is the same computation as one differentiable
operation: the solver's states, a few latents a step, are kept, and its steps are run backwards one
at a time, so that no more than one step's graph is alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_defense.modes import as_deployed
from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.projection.losses import LOSSES
from manifold_defense.projection.metric import Metric, mean_metric
from manifold_defense.projection.rounding import Rounded, has_bfloat16
from manifold_defense.projection.solvers import SOLVERS, State
from manifold_defense.projection.starts import Bank, make_bank, starts
from manifold_defense.types import Encoder, Generator, Projection


def project(
    generator: Generator,
    x: Tensor,
    config: ProjectionConfig,
    *,
    encoder: Encoder | None = None,
    bank: Bank | None = None,
    metric: Metric | None = None,
) -> Projection:
    """Project images (N, C, H, W) in [0, 1] onto the range of `generator`.

    Deterministic, and per image: neither the batch nor the caller's gradient, inference or autocast mode,
    nor the mode of the modules, which are asked in eval mode, changes the result (beyond rounding, which a
    solver can amplify where the generator has a kink).
    The result carries no gradient; see `project_exactly` for one that does. A bank or metric that the
    config asks for is computed unless it is passed. Raises ValueError for anything but finite float
    images of the generator's shape in [0, 1]; an empty batch gives an empty projection.
    """
    check_images(x, generator.image_shape)
    with torch.inference_mode(False), torch.enable_grad(), as_deployed(generator, encoder):
        x = x.detach().clone()  # leaves inference mode
        bank, metric = surroundings(generator, x, config, bank, metric)
        problem = Problem(generator, config, metric)
        parts = [
            _project_chunk(problem, part, start.detach())
            for part, start in _chunks(problem, x, encoder, bank)
        ]
    return Projection(*(torch.cat(column) for column in zip(*parts, strict=True)))


def project_exactly(
    generator: Generator,
    x: Tensor,
    config: ProjectionConfig,
    *,
    encoder: Encoder | None = None,
    bank: Bank | None = None,
    metric: Metric | None = None,
) -> Tensor:
    """`G(z*(x))` (N, C, H, W) as `project` returns it, differentiable in x through every step.

    This is the true gradient of the deployed computation, the choices among restarts, iterates and
    bank samples held fixed (they are piecewise constant). Backward costs about three times the
    forward pass of the winning restart; it needs second derivatives of G, and gives first
    derivatives of the result.
    """
    check_images(x, generator.image_shape)
    with as_deployed(generator, encoder):
        bank, metric = surroundings(generator, x.detach(), config, bank, metric)
        problem = Problem(generator, config, metric)
        return torch.cat(
            [
                generator(problem.latent(_Unrolled.apply(part, start, problem)))
                for part, start in _chunks(problem, x, encoder, bank)
            ]
        )


def project_softly(
    generator: Generator,
    x: Tensor,
    config: ProjectionConfig,
    *,
    encoder: Encoder | None = None,
    bank: Bank | None = None,
    metric: Metric | None = None,
    temperature: float = 0.5,
) -> Tensor:
    """`Σ_r p_r G(z_r)` (N, C, H, W) over the restarts, `p = softmax(−loss / (temperature · least loss))`.

    Stands in for `project_exactly` where an attack would rather know which restart is about to win:
    differentiable in x through every step of all of them, at their price. None is dropped underway; those
    that diverged have no weight.
    """
    check_images(x, generator.image_shape)
    parts = [x[:0]]
    with as_deployed(generator, encoder):
        bank, metric = surroundings(generator, x.detach(), config, bank, metric)
        each = Problem(generator, replace(config, restarts=1, halve_every=0), metric)
        for part, start in _chunks(Problem(generator, config, metric), x, encoder, bank):
            target = part.repeat_interleave(config.restarts, 0)
            point = _Unrolled.apply(target, start.flatten(0, 1).unsqueeze(1), each)
            point, diverged = _weighable(each, point, target, config.restarts)
            loss = each.loss(point, target)[0].view(len(part), -1)
            scale = temperature * loss.amin(1, keepdim=True).clamp(min=1e-12)
            weights = (-loss / scale).masked_fill(diverged, -torch.inf).softmax(1)
            images = generator(each.latent(point)).view(len(part), config.restarts, *part.shape[1:])
            parts.append(torch.einsum("nr,nrchw->nchw", weights, images))
    return torch.cat(parts)


def _weighable(problem: Problem, point: Tensor, target: Tensor, restarts: int) -> tuple[Tensor, Tensor]:
    """Points (N·R, D) whose loss is finite if one of their image's is, and which (N, R) are stand-ins.

    Those stand where the best of their image's does: zero times NaN would be no zero.
    """
    with torch.no_grad():
        loss = problem.loss(point, target)[0].view(-1, restarts).nan_to_num(torch.inf, torch.inf)
    diverged = loss.isinf() & loss.isfinite().any(1, keepdim=True)
    best = loss.argmin(1) + restarts * torch.arange(len(loss), device=loss.device)
    stand_in = point.detach()[best].repeat_interleave(restarts, 0)
    return torch.where(diverged.view(-1, 1), stand_in, point), diverged


def surroundings(
    generator: Generator,
    like: Tensor,
    config: ProjectionConfig,
    bank: Bank | None = None,
    metric: Metric | None = None,
) -> tuple[Bank | None, Metric | None]:
    """Bank and metric that `config` asks for, made where they are missing; None where it does not."""
    with as_deployed(generator):
        if config.uses_bank and bank is None:
            bank = make_bank(generator, like, config.bank, config.seed)
        if config.uses_metric and metric is None:
            metric = mean_metric(generator, like)
    return bank if config.uses_bank else None, metric if config.uses_metric else None


class Problem(NamedTuple):
    """What is minimised, in the coordinates in which it is: points w (M, D) stand for latents z."""

    generator: Generator
    config: ProjectionConfig
    metric: Metric | None

    def rounded(self, device: torch.device) -> Problem:
        """The same in the precision of the config, as far as the device has it."""
        if self.config.precision == "full" or not has_bfloat16(device):
            return self
        return self._replace(generator=Rounded(self.generator))

    def latent(self, point: Tensor) -> Tensor:
        return point if self.metric is None else point @ self.metric.inverse

    def point(self, z: Tensor) -> Tensor:
        return z if self.metric is None else z @ self.metric.factor

    def loss(self, point: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, and the squared distance alone, for points towards x: both (M,)."""
        z = self.latent(point)
        r = (self.generator(z) - x).flatten(1)
        loss = LOSSES[self.config.loss](r, self.config.radius)
        distance = loss if self.config.loss == "squared" else r.detach().square().sum(1)
        if self.config.prior_weight:
            loss = loss + self.config.prior_weight * z.square().sum(1)
        return loss, distance

    def step(self, state: State, loss: Tensor, gradient: Tensor, k: int, pixels: int) -> State:
        """The solver's step, and the latents it proposes clipped to the ball of the config."""
        config, solver = self.config, SOLVERS[self.config.solver]
        scale = pixels if solver.mean_loss and self.metric is None else 1
        after = solver.step(state, loss / scale, gradient / scale, k, config)
        return (self.point(self.clipped(self.latent(after[0]))), *after[1:]) if config.clip else after

    def clipped(self, z: Tensor) -> Tensor:
        """Latents (…, D), those outside the ball of the config moved onto it."""
        if not self.config.clip:
            return z
        size = (z.square().mean(-1, keepdim=True) + 1e-24).sqrt()
        return z * (self.config.clip / size).clamp(max=1.0)


def _chunks(
    problem: Problem, x: Tensor, encoder: Encoder | None, bank: Bank | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (n, C, H, W) and the points to start from (n, R, D), so many at a time as fit a chunk."""
    config = problem.config
    for part in x.split(max(1, config.chunk_on(x.device.type) // config.restarts)):
        z = starts(part, problem.generator.latent_dim, config, encoder, bank)
        yield part, problem.point(problem.clipped(z))


def _project_chunk(problem: Problem, x: Tensor, start: Tensor) -> Projection:
    path = _descend(problem, x, start)
    winner = path.winner()
    z = problem.latent(path.point[winner])
    with torch.no_grad():
        image = problem.generator(z)
        error = (image - x).square().flatten(1).mean(1)
    spent, restarts = path.spent.view(start.shape[:2]).sum(1), start.shape[1]
    return Projection(z, image, error, spent, winner % restarts)


class _Path:
    """The course of M = N·R independent descents: of each the best point and loss, and what it took."""

    def __init__(self, start: Tensor) -> None:
        self.images, self.restarts, _ = start.shape
        self.point = start.flatten(0, 1)  # (M, D) chosen iterate
        device, rows = start.device, self.images * self.restarts
        self.loss = start.new_full((rows,), torch.inf)  # (M,) what it costs
        self.index = torch.zeros(rows, dtype=torch.long, device=device)  # (M,) after how many steps
        self.spent = torch.zeros_like(self.index)  # (M,) gradient evaluations
        # Which rows were still running at each step (None: all), their states, loss and gradient.
        self.states: list[tuple[Tensor | None, State]] = []
        self.slopes: list[tuple[Tensor, Tensor]] = []

    def offer(self, rows: Tensor, point: Tensor, loss: Tensor, k: int, *, replace: bool) -> None:
        better = torch.ones_like(loss, dtype=torch.bool) if replace else loss < self.loss[rows]
        self.point[rows] = torch.where(better.unsqueeze(1), point, self.point[rows])
        self.loss[rows] = torch.where(better, loss, self.loss[rows])
        self.index[rows] = torch.where(better, k, self.index[rows])

    def winner(self) -> Tensor:
        """The row of least loss of each image, (N,); one that diverged never wins."""
        loss = self.loss.view(self.images, self.restarts).nan_to_num(nan=torch.inf)
        first = self.restarts * torch.arange(self.images, device=loss.device)
        return first + (loss.argmin(1) if self.images else 0)

    def better_half(self, rows: Tensor) -> Tensor:
        """Whether a running row is in the better half, rounded up, of its image's running ones."""
        running = torch.full_like(self.loss, torch.nan)
        running[rows] = self.loss[rows].nan_to_num(nan=torch.inf)
        table = running.view(self.images, self.restarts)
        rank = table.argsort(dim=1, stable=True).argsort(dim=1)  # NaN, not running, comes last
        keep = rank < ((~table.isnan()).sum(1, keepdim=True) + 1) // 2
        return keep.flatten()[rows]


def _descend(problem: Problem, x: Tensor, start: Tensor, *, record: bool = False) -> _Path:
    """Run the solver from starts (N, R, D) towards x (N, C, H, W); gradients enabled by the caller."""
    config, pixels, problem = problem.config, x.shape[1:].numel(), problem.rounded(x.device)
    evaluate, advance = problem.loss, problem.step
    if config.compiled:
        evaluate, advance = torch.compile(evaluate), torch.compile(advance)
    path = _Path(start.detach().clone())
    rows = torch.arange(path.images * path.restarts, device=x.device)
    target = x.repeat_interleave(path.restarts, 0)
    state = SOLVERS[config.solver].init(start.detach().flatten(0, 1), config)
    whole = True
    for k in range(config.steps):
        if not len(rows):
            break
        if record:
            path.states.append((None if whole else rows, state))
        point = state[0].detach().requires_grad_(True)
        # The loss is summed over problems, never averaged: each descends as if it were alone.
        loss, distance = evaluate(point, target)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        loss, distance = loss.detach(), distance.detach()
        if record:
            path.slopes.append((loss, gradient))
        path.spent[rows] += 1
        path.offer(rows, point.detach(), loss, k, replace=config.iterate == "last")
        with torch.no_grad():
            state = advance(state, loss, gradient, k, pixels)
        going = _going(path, rows, distance / pixels, gradient, k, config)
        if going is not None and not bool(going.all()):
            rows, target, state = rows[going], target[going], tuple(entry[going] for entry in state)
            whole = False
    if len(rows):
        last = state[0].detach()
        loss = last.new_zeros(len(last))
        if config.chooses:  # else it need not be drawn here
            with torch.no_grad():
                loss, _ = problem.loss(last, target)
        path.offer(rows, last, loss, config.steps, replace=config.iterate == "last")
    return path


def _going(
    path: _Path, rows: Tensor, error: Tensor, gradient: Tensor, k: int, config: ProjectionConfig
) -> Tensor | None:
    """Which of the running rows go on after step k, (rows,); None if the schedule never stops any."""
    if not (config.halve_every or config.target_error or config.tolerance):
        return None
    going = torch.ones_like(rows, dtype=torch.bool)
    if config.target_error:
        reached = torch.zeros_like(path.spent, dtype=torch.bool)
        reached[rows] = error <= config.target_error
        done = reached.view(path.images, path.restarts).any(1)
        going &= ~done[rows // path.restarts]
    if config.tolerance:
        going &= gradient.square().sum(1).sqrt() > config.tolerance
    if config.halve_every and (k + 1) % config.halve_every == 0:
        going &= path.better_half(rows)
    return going


def refuse_second_derivatives() -> None:
    """In a backward pass: raise RuntimeError if it is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError("a projection has first derivatives alone: expected no create_graph=True")


class _Unrolled(torch.autograd.Function):
    """(x (N, C, H, W), starts (N, R, D)) -> w* (N, D), differentiated by running the solver backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, problem: Problem) -> Tensor:
        with torch.enable_grad():
            path = _descend(problem, x, start, record=True)
        winner = path.winner()
        place = torch.zeros_like(path.index)
        ctx.problem, ctx.winner, ctx.index = problem, winner, path.index[winner]
        ctx.states, ctx.slopes = [], []  # of the winners that went on from there
        for k, ((rows, state), slope) in enumerate(zip(path.states, path.slopes, strict=True)):
            onward = winner[ctx.index > k]
            if rows is not None:
                place[rows] = torch.arange(len(rows), device=x.device)
                onward = place[onward]
            ctx.states.append(tuple(entry[onward] for entry in state))
            ctx.slopes.append(tuple(entry[onward] for entry in slope))
        ctx.save_for_backward(x, start)
        return path.point[winner]

    @staticmethod
    def backward(ctx: Any, grad_point: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivatives()
        x, start = ctx.saved_tensors
        problem: Problem = ctx.problem
        pixels, init = x.shape[1:].numel(), SOLVERS[problem.config.solver].init
        grad_x = torch.zeros_like(x)
        # Cotangent of each image's state before the next step to be undone; w* is the first entry
        # of the state after `index` steps, and no later step touches it.
        cotangent = [torch.zeros_like(entry) for entry in init(grad_point, problem.config)]
        cotangent[0] = grad_point.clone()
        # What nobody asks of need not be undone, and where it diverged cannot be.
        wanted = (grad_point != 0).any(1)
        for k in reversed(range(len(ctx.states))):
            kept = (ctx.index > k).nonzero().squeeze(1)
            asked = wanted[kept]
            onward = kept[asked]
            if not len(onward):
                continue
            with torch.enable_grad(), as_deployed(problem.generator):
                state = tuple(entry[asked].detach().requires_grad_(True) for entry in ctx.states[k])
                image = x[onward].requires_grad_(True)
                # A trial whose loss is not finite was rejected, and nothing hangs on it: whatever stands in
                # its place, as zero times NaN would be NaN.
                met_there = [entry[asked].view(len(onward), -1) for entry in ctx.slopes[k]]
                sound = torch.cat(met_there, 1).isfinite().all(1, keepdim=True)
                at = torch.where(sound, state[0], 0.0)
                loss, _ = problem.loss(at, image)
                (gradient,) = torch.autograd.grad(loss.sum(), at, create_graph=True)
                # The values of the descent, which may have been rounded, so that the step decides as it
                # did there; the derivatives of what was computed here.
                loss, gradient = (
                    made + (met[asked] - made).detach()
                    for made, met in zip((loss, gradient), ctx.slopes[k], strict=True)
                )
                after = problem.step(state, loss, gradient, k, pixels)
            reached = [(e, w[onward]) for e, w in zip(after, cotangent, strict=True) if e.requires_grad]
            *before, into_x = torch.autograd.grad(
                [e for e, _ in reached], (*state, image), [w for _, w in reached], allow_unused=True
            )
            if into_x is not None:
                grad_x[onward] += into_x
            for total, part in zip(cotangent, before, strict=True):
                total[onward] = 0.0 if part is None else part
        # Through `init` to the start: an L-BFGS state, for one, holds it twice.
        with torch.enable_grad():
            point = start.flatten(0, 1)[ctx.winner].detach().requires_grad_(True)
            pairs = zip(init(point, problem.config), cotangent, strict=True)
            reached = [(e, w) for e, w in pairs if e.requires_grad]
        (into_start,) = torch.autograd.grad([e for e, _ in reached], point, [w for _, w in reached])
        grad_start = torch.zeros_like(start)
        grad_start.view(-1, start.shape[-1])[ctx.winner] = into_start
        return grad_x, grad_start, None


def check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless x is a batch of finite float images of `image_shape` in [0, 1]."""
    if not isinstance(x, Tensor):
        raise ValueError(f"images: expected a tensor of floats in [0, 1], got {type(x).__name__}")
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
        raise ValueError(f"images: expected values in [0, 1], got [{float(low):.7g}, {float(high):.7g}]")
