"""Gradients of the projection that need no solver: from its optimality, or from the range's shape.

N images   D latent size   J = ∂G/∂z at z*   v a cotangent of G(z*), shaped as the images.
All are taken at the z* that the deployed solver found, whatever it is; the implicit ones are the
gradient of the projection only as far as it is stationary (`stationarity`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_defense.modes import as_deployed
from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.projection.descent import Problem, refuse_second_derivatives
from manifold_defense.projection.jacobian import Jacobian
from manifold_defense.projection.losses import LOSSES
from manifold_defense.projection.metric import Metric
from manifold_defense.types import Generator

Formula = Literal["implicit", "gauss_newton", "tangent"]


def attach_gradient(
    generator: Generator,
    x: Tensor,
    z: Tensor,
    config: ProjectionConfig,
    formula: Formula,
    *,
    metric: Metric | None = None,
    iterations: int = 16,
    tolerance: float = 1e-2,
    damping: float = 1e-4,
) -> Tensor:
    """`G(z)` (N, C, H, W) for z (N, D), with a gradient in x (N, C, H, W) that follows `formula`.

    With F the projection's loss, W its second derivative in the image, and v a cotangent:

    implicit      W J (∇²_z F)⁻¹ Jᵀ v, the implicit function theorem at a stationary point
    gauss_newton  W J (Jᵀ W J + 2μI)⁻¹ Jᵀ v: the same without the curvature of the range
    tangent       J (JᵀJ)⁻¹ Jᵀ v: onto the tangent space of the range, whatever the loss

    The systems are solved by conjugate gradients, at most `iterations` of them, to a residual of
    `tolerance` relative to Jᵀv; `damping`, relative to the mean of diag(JᵀJ), keeps directions apart
    that the generator ignores, and an image whose matrix is not positive definite stops where that
    shows (Steihaug 1983).
    """
    problem = Problem(generator, config, metric)
    image: Tensor = _Attached.apply(x, z, problem, formula, iterations, tolerance, damping)
    return image


def stationarity(generator: Generator, x: Tensor, z: Tensor, config: ProjectionConfig) -> Tensor:
    """`‖∇_z F‖ / (2 s ‖r‖)` of each image, (N,): 0 where z (N, D) is a stationary point of the loss F.

    r = G(z) − x, and s² is the mean squared stretch of J along random directions: at a z drawn at
    random the value is of order 1, and at most some √D. The implicit formulas speak of the projection
    only where it is far smaller.
    """
    with torch.inference_mode(False), torch.enable_grad(), as_deployed(generator):
        products = Jacobian(generator, z)
        x = x.detach().clone()
        loss, distance = Problem(generator, config, None).loss(products.z, x)
        gradient: Tensor = torch.autograd.grad(loss.sum(), products.z)[0]
        stretch = products.stretch().squeeze(1)
    size: Tensor = (stretch * distance.detach()).clamp(min=1e-24).sqrt()
    length: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    return length / (2 * size)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        problem: Problem,
        formula: Formula,
        iterations: int,
        tolerance: float,
        damping: float,
    ) -> Tensor:
        ctx.problem, ctx.formula, ctx.limits = problem, formula, (iterations, tolerance, damping)
        ctx.save_for_backward(x, z)
        with as_deployed(problem.generator):
            image: Tensor = problem.generator(z)
        return image

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, z = ctx.saved_tensors
        with as_deployed(ctx.problem.generator):
            grad_x = _pulled_back(ctx.problem, ctx.formula, x, z, v, *ctx.limits)
        return grad_x, None, None, None, None, None, None


def _pulled_back(
    problem: Problem,
    formula: Formula,
    x: Tensor,
    z: Tensor,
    v: Tensor,
    iterations: int,
    tolerance: float,
    damping: float,
) -> Tensor:
    """The cotangent of x (N, C, H, W) that `formula` makes of v, that of G(z); see `attach_gradient`."""
    generator, config = problem.generator, problem.config
    products = Jacobian(generator, z)
    residual = (products.image.detach() - x).flatten(1)

    def curvature(w: Tensor) -> Tensor:
        """`W w`, the loss's second derivative in the image; 2 for the squared error."""
        return _second_derivative(config, residual, w.flatten(1)).view_as(w)

    def normal(p: Tensor) -> Tensor:
        """The matrix of `tangent` or `gauss_newton`, times p (N, D)."""
        along = products.along(p)
        if formula == "tangent":
            return products.transposed(along)
        return products.transposed(curvature(along)) + 2 * config.prior_weight * p

    def hessian(p: Tensor) -> Tensor:
        """`∇²_z F p` (N, D)."""
        product: Tensor = torch.autograd.grad(slope, products.z, p, retain_graph=True)[0]
        return product

    if formula == "implicit":
        with torch.enable_grad():
            loss, _ = Problem(generator, config, None).loss(products.z, x.detach())
            (slope,) = torch.autograd.grad(loss.sum(), products.z, create_graph=True)
    matrix = hessian if formula == "implicit" else normal
    right, scale = products.transposed(v), products.stretch()
    solution = conjugate_gradients(
        lambda p: matrix(p) + damping * scale * p,
        right,
        precondition=_inverse_metric(problem.metric),
        iterations=iterations,
        tolerance=tolerance,
    )
    along = products.along(solution)
    return along if formula == "tangent" else curvature(along)


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Solve `A p = b` for many independent systems, b (N, D), by preconditioned CG.

    (Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.3.) A system stops when its
    residual is `tolerance · ‖b‖`, or where a direction of no positive curvature turns up; the first
    such direction is the answer if it is the very first.
    """
    # Of right sides of any size: what is squared below would underflow.
    unit = right.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    right = right / unit
    solution, residual = torch.zeros_like(right), right.clone()
    search = precondition(residual)
    size = _dot(residual, search)
    goal = tolerance * _dot(right, right).sqrt()
    running = _dot(residual, residual).sqrt() > goal
    for k in range(iterations):
        if not bool(running.any()):
            break
        product = matrix(search)
        bend = _dot(search, product)
        running &= bend > 0
        if k == 0:
            solution = torch.where(running, solution, search)
        step = torch.where(running, size / torch.where(running, bend, 1.0), 0.0)
        solution = solution + step * search
        residual = residual - step * product
        running &= _dot(residual, residual).sqrt() > goal
        preconditioned = precondition(residual)
        fresh = _dot(residual, preconditioned)
        search = preconditioned + fresh / torch.where(size > 0, size, 1.0) * search
        size = fresh
    return unit * solution


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (N, 1)."""
    return (a * b).sum(1, keepdim=True)


def _inverse_metric(metric: Metric | None) -> Callable[[Tensor], Tensor]:
    if metric is None:
        return lambda r: r
    inverse = metric.inverse  # M⁻¹ = inverseᵀ · inverse for M = factor · factorᵀ
    return lambda r: r @ inverse.T @ inverse


def _second_derivative(config: ProjectionConfig, r: Tensor, w: Tensor) -> Tensor:
    """`∇² loss(r) · w` for residuals and directions (N, P)."""
    with torch.enable_grad():
        r = r.detach().requires_grad_(True)
        value = LOSSES[config.loss](r, config.radius)
        (slope,) = torch.autograd.grad(value.sum(), r, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(w)
        product: Tensor = torch.autograd.grad(slope, r, w.detach())[0]
    return product
