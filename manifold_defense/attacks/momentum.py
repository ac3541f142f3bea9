"""MI-FGSM and its diverse inputs: the attacks that carry over best to other models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.highest import Highest
from manifold_defense.attacks.norms import Bounds, column, free, geometry
from manifold_defense.attacks.objective import logits_and_gradient
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

# Diverse inputs are shrunk to at least this share of their side, and padded back (Xie et al. 2019).
_SHRUNK = 0.9
_BOX: Bounds = (0.0, 1.0)


@attack
def mi_fgsm(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    step_size: float | None = None,
    steps: int = 10,
    decay: float = 1.0,
    diversity: float = 0.0,
    loss: str = "ce",
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """`g ← μ g + ∇ℓ / ‖∇ℓ‖₁`, a step along g (Dong et al. 2018, eqs. 6 and 7): images (N, C, H, W).

    `decay` is μ; `step_size` in pixels is `eps / steps` by default. With probability `diversity` a
    step takes its gradient through a random shrinking and padding, the same for all images (DI,
    Xie et al. 2019). Returns, of all iterates and the clean image, the one with the highest margin.
    """
    shape = geometry(norm)
    if steps < 1:
        raise ValueError(f"expected steps ≥ 1, got {steps}")
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity: expected in [0, 1], got {diversity}")
    step_size = eps / steps if step_size is None else step_size
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    current, momentum = x.clone(), torch.zeros_like(x)
    with evaluation_mode(model):
        with torch.no_grad():
            best = Highest(x, y, model(x), targeted=targeted, stop_early=stop_early)
        active = best.sought()
        for _ in range(steps):
            if len(active) == 0:
                break
            at = current[active]
            seen = _diverse(model, x, rng) if diversity and _draw(rng) < diversity else model
            _, gradient = logits_and_gradient(seen, at, y[active], loss, targeted)
            gradient = gradient.nan_to_num(0, 0, 0)
            length = gradient.flatten(1).abs().sum(1).clamp(min=1e-30)
            momentum[active] = decay * momentum[active] + gradient / column(length, gradient)
            # A pixel at its bound takes no share of a step's length.
            moved = at + step_size * shape.steepest(free(momentum[active], at, _BOX))
            current[active] = at = shape.place(x[active], moved, eps, _BOX)
            with torch.no_grad():
                best.keep(active, at, model(at))
            active = active[best.going(active)]
    return best.image


def _draw(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))


def _diverse(model: Classifier, like: Tensor, rng: torch.Generator) -> Classifier:
    """The model behind a random shrinking of its images, and a padding back to their size with zeros."""
    height, width = like.shape[2:]
    share = _SHRUNK + (1 - _SHRUNK) * _draw(rng)
    rows, columns = (max(1, min(side - 1, round(share * side))) for side in (height, width))
    top, left = int(_draw(rng) * (height - rows + 1)), int(_draw(rng) * (width - columns + 1))
    border = (left, width - columns - left, top, height - rows - top)

    def changed(x: Tensor) -> Tensor:
        small = F.interpolate(x, (rows, columns), mode="bilinear", align_corners=False)
        return model(F.pad(small, border))

    return changed
