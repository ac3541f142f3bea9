"""Overpowered pairs: points of the range that are close and classified apart (Ilyas et al. 2017, 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.lagrange import raised, unit
from manifold_defense.attacks.norms import column, geometry
from manifold_defense.attacks.objective import logits_and_gradient, margins
from manifold_defense.attacks.on_range import range_attack
from manifold_defense.modes import evaluation_mode
from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.projection.solvers import SOLVERS
from manifold_defense.types import Classifier, Generator, Norm

# The distance that is aimed at, as a share of eps: a multiplier swings about its goal.
_AIM = 0.99
# Dual ascent, the weight of the violation itself, and the most that both come to, where the climb has
# length 1: starts are far apart, and more would hold the two together before they reach the boundary.
_ASCENT, _AUGMENTED, _STRONGEST = 0.3, 5.0, 1.5
_LEARNING_RATE = 0.3


class Pairs(NamedTuple):
    """M pairs of points of the range; where none was `found`, a start and itself, at distance 0."""

    z1: Tensor  # (M, D)
    z2: Tensor  # (M, D)
    x1: Tensor  # (M, C, H, W), G(z1)
    x2: Tensor  # (M, C, H, W)
    distance: Tensor  # (M,) ‖x1 − x2‖₂, at most eps
    gap: Tensor  # (M,) how far, in logits, the less clear of the two is on its side of the boundary
    found: Tensor  # (M,) bool: gap > 0, that is the model gives the two different labels


def overpowered_pairs(
    model: Classifier,
    generator: Generator,
    *,
    n: int = 16,
    starts: tuple[Tensor, Tensor] | None = None,
    around: tuple[Tensor, float] | None = None,
    eps: float = 1.0,
    steps: int = 200,
    learning_rate: float | None = None,
    seed: int = 0,
) -> Pairs:
    """`max D(f(Gz₁), f(Gz₂))` s.t. `‖Gz₁ − Gz₂‖₂ ≤ eps`, from `starts` (M, D) or n pairs of prior draws.

    With `around`, latents (M, D) and a radius, both ends begin and stay within that of them, L∞, in standard
    deviations of the prior: for pairs that have the label of an image. `learning_rate` is then half the
    radius, else 0.3.

    With k the label of the first start, D is the lesser of `Z_k − max_{i≠k} Z_i` at Gz₁ and of
    `max_{i≠k} Z_i − Z_k` at Gz₂: above zero if and only if the pair is one, and on a linear model of two
    classes at most half the change of Z that eps allows on the range. The Lagrangian's λ ≥ 0 is each
    pair's own and climbs by dual ascent, the latents by Adam. Of all iterates within eps the one of the
    highest D is returned.

    A pair of one true label is damage that no projection undoes. Whether the pair straddles a true
    boundary instead, the model cannot say: keep eps, or the radius, small against the distance of classes.
    """
    if not eps > 0 or steps < 1 or n < 0:
        raise ValueError(f"expected eps > 0, steps ≥ 1, n ≥ 0, got {eps}, {steps}, {n}")
    if starts is not None and around is not None:
        raise ValueError("around: expected no starts beside it, they are drawn there")
    least = most = None
    if around is not None:
        centre, radius = around
        if not radius > 0:
            raise ValueError(f"around: expected a radius above 0, got {radius}")
        least, most = (torch.cat([centre, centre]).detach() + side for side in (-radius, radius))
        starts = _drawn_around(centre, radius, seed)
        learning_rate = learning_rate or radius / 2
    first, second = _draws(generator, n, seed) if starts is None else starts
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"starts: expected two of shape (M, D), got {tuple(first.shape)}, {tuple(second.shape)}"
        )
    size, count = geometry("l2").size, len(first)
    adam = SOLVERS["adam"]
    config = ProjectionConfig("adam", "prior", steps=steps, step_size=learning_rate or _LEARNING_RATE)

    with evaluation_mode(model), evaluation_mode(generator):
        best = torch.cat([first, first]).detach()
        with torch.no_grad():
            label = model(generator(best[:count])).argmax(1)
        labels = torch.cat([label, label])
        # The first half of the rows is to keep its label, the second to lose it.
        sign = torch.cat([best.new_full((count,), -1.0), best.new_ones(count)])
        best_gap = best.new_full((count,), -torch.inf)
        multiplier = best.new_zeros(count)
        state = adam.init(torch.cat([first, second]).detach().clone(), config)
        for step in range(steps + 1):
            with torch.enable_grad():
                point = state[0].detach().requires_grad_(True)
                image = generator(point)
            logits, climb = logits_and_gradient(model, image.detach(), labels, "margin", targeted=False)
            side = (sign * margins(logits, labels, targeted=False)).to(best.dtype)
            gap = torch.minimum(side[:count], side[count:])
            apart = image.detach()[:count] - image.detach()[count:]
            distance = size(apart)
            better = ((distance <= eps) & (gap > best_gap)).repeat(2)
            best[better] = point.detach()[better]
            best_gap = torch.where(better[:count], gap, best_gap)
            if step == steps:
                break
            # Only the lesser side gains: the pair moves as a whole until the boundary is between the two.
            behind = (side <= gap.repeat(2)) * sign
            violation = distance / (_AIM * eps) - 1
            weight = raised(multiplier, violation, _AUGMENTED).clamp(max=_STRONGEST)
            multiplier = raised(multiplier, violation, _ASCENT)
            pull = column(weight, apart) * unit(apart)
            cotangent = torch.cat([pull, -pull]) - column(behind, climb) * unit(climb)
            (gradient,) = torch.autograd.grad(image, point, cotangent)
            with torch.no_grad():
                moved, *memory = adam.step(state, gap, gradient.nan_to_num(0, 0, 0), step, config)
                state = (moved if around is None else moved.clamp(least, most), *memory)
        return _judged(model, generator, best, label)


@attack
def pair_break(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    generator: Generator,
    z: Tensor | None = None,
    norm: Norm = "l2",
    eps: float = 4.0,
    steps: int = 200,
    restarts: int = 1,
    learning_rate: float = 0.1,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The break of Ilyas et al.: a point of the range within `eps` (L2) of each image, with another label.

    `range_attack` that accepts nothing but points of the range, for images (N, C, H, W) with labels y (N,)
    and starts z (N, D), the images' projections. `model` is the classifier behind the filter, or the
    whole: an exact projection returns such a point as it came. The clean image where none was found.
    """
    if norm != "l2":
        raise ValueError(f"pair_break: expected norm l2, got {norm!r}")
    return range_attack(
        model,
        x,
        y,
        generator=generator,
        z=z,
        norm=norm,
        eps=eps,
        steps=steps,
        restarts=restarts,
        learning_rate=learning_rate,
        strict=True,
        targeted=targeted,
        stop_early=stop_early,
        seed=seed,
    )


def _draws(generator: Generator, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two times (n, D) of the prior, on the generator's device and in its type if it is a module."""
    weights = list(generator.parameters()) if isinstance(generator, nn.Module) else []
    z = torch.randn(2, n, generator.latent_dim, generator=torch.Generator().manual_seed(seed))
    first, second = z.to(weights[0]) if weights else z
    return first, second


def _drawn_around(centre: Tensor, radius: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two times (M, D), uniform within the radius, L∞, of latents (M, D)."""
    share = torch.rand(2, *centre.shape, generator=torch.Generator().manual_seed(seed)).to(centre)
    first, second = centre.detach() + radius * (2 * share - 1)
    return first, second


@torch.no_grad()
def _judged(model: Classifier, generator: Generator, z: Tensor, label: Tensor) -> Pairs:
    """What z (2M, D), first halves first, are worth: predicted again; a start and itself where nothing."""
    z1, z2 = z.chunk(2)
    before, after = margins(model(generator(z1)), label, False), margins(model(generator(z2)), label, False)
    gap = torch.minimum(-before, after).to(z.dtype)
    found = gap > 0
    z2 = torch.where(found.unsqueeze(1), z2, z1)
    x1, x2 = generator(z1), generator(z2)
    return Pairs(z1, z2, x1, x2, geometry("l2").size(x1 - x2), gap, found)
