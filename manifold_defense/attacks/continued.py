"""PGD from where another attack ended: for what lies just beyond the reach of either."""

from __future__ import annotations

from torch import Tensor

from manifold_defense.attacks.ascent import Climb, ascend_in_ball
from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.square import square
from manifold_defense.attacks.window import window_pgd
from manifold_defense.types import Classifier, Norm

_LONGEST = 0.3  # the first step, of eps: as in `window_pgd`


@attack
def square_pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    queries: int = 2000,
    steps: int = 40,
    restarts: int = 2,
    loss: str = "both",
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """PGD from where the Square attack of so many `queries` ends: images (N, C, H, W) with labels y (N,).

    Square (Andriushchenko et al. 2020) gathers what no gradient leads to, but stops short of the boundary by
    what no window undoes; PGD undoes that, and does not find the way there. Each restart climbs one loss
    from the same images, its first step 0.3 eps, falling linearly to zero. Returns the image of the highest
    margin found, the clean one included; `loss` and `stop_early` as in `pgd`.
    """
    found = square(
        model, x, y, norm=norm, eps=eps, steps=queries, targeted=targeted, stop_early=stop_early, seed=seed
    )
    climb = Climb(steps, restarts, loss, targeted, stop_early)
    return ascend_in_ball(model, x, y, found.__getitem__, climb, norm=norm, eps=eps, longest=_LONGEST * eps)


@attack
def transfer_pgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    surrogate: Classifier | None = None,
    norm: Norm = "l2",
    eps: float = 2.5,
    tries: int = 50,
    steps: int = 40,
    restarts: int = 2,
    loss: str = "both",
    targeted: bool = False,
    stop_early: bool = True,
    pieces: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """PGD from where `window_pgd` at a surrogate ends: images (N, C, H, W) with labels y (N,).

    Of a filter the surrogate is the classifier behind it. Up its gradient, which knows nothing of the filter,
    lies what the filter's own, flat there, does not lead to; from there its own goes on. Both climb so many
    `steps` in so many `restarts`; the surrogate's go on after it is fooled. By default it is `model` itself.
    Returns the image of the highest margin found, the clean one included; the rest as in
    `window_pgd` and `square_pgd`.
    """
    found = window_pgd(
        model if surrogate is None else surrogate,
        x,
        y,
        norm=norm,
        eps=eps,
        steps=steps,
        restarts=restarts,
        tries=tries,
        loss=loss,
        targeted=targeted,
        stop_early=False,
        pieces=pieces,
        seed=seed,
    )
    climb = Climb(steps, restarts, loss, targeted, stop_early)
    return ascend_in_ball(model, x, y, found.__getitem__, climb, norm=norm, eps=eps, longest=_LONGEST * eps)
