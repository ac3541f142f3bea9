"""DeepFool (Moosavi-Dezfooli et al. 2016): to the nearest linearised boundary, again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.halfspace import nearest_in_halfspace
from manifold_defense.attacks.minimum_norm import Nearest, clearance
from manifold_defense.attacks.norms import sizes
from manifold_defense.attacks.objective import input_gradient
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm


@attack
def deepfool(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2",
    eps: float = float("inf"),
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    halvings: int = 8,
    targeted: bool = False,
    seed: int = 0,
) -> Tensor:
    """The adversarial image that DeepFool meets first, for images (N, C, H, W) and labels (N,).

    Algorithm 2 of the paper in L2, its section 3.3 in L∞: linearises the boundary between y and each
    of the `candidates` classes (or fewer) that the clean image is most taken for, steps to the nearest
    of them, and tries the sum of the steps lengthened by `overshoot`. Unlike the paper, a step is the
    shortest inside [0, 1], so that pixels at a bound do not spoil it, and the segment from the clean
    image to the one found is halved `halvings` times, in forward passes. Targeted, the one boundary is
    that between the target and the class that is ahead. A step costs a forward pass and as many
    backward passes as candidates.

    Cheap and not the nearest: `ddn` and `fmn` find nearer ones. An image for which nothing within
    `eps` was found is returned unchanged. Nothing is random: `seed` is there for the common signature.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm: expected one of l2, linf, got {norm!r}")
    if steps < 1 or not overshoot >= 0 or candidates < 1 or halvings < 0:
        raise ValueError(
            "expected steps ≥ 1, overshoot ≥ 0, candidates ≥ 1, halvings ≥ 0, "
            f"got {steps}, {overshoot}, {candidates}, {halvings}"
        )
    x = x.detach()
    with evaluation_mode(model):
        nearest = Nearest(model, x, y, norm=norm, eps=eps, targeted=targeted)
        with torch.no_grad():
            others = model(x).scatter(1, y.unsqueeze(1), -torch.inf)
        likely = others.argsort(dim=1, descending=True)[:, : min(candidates, others.shape[1] - 1)]
        total, tried = torch.zeros_like(x), x.clone()
        for step in range(steps + 1):
            active = (~nearest.size.isfinite()).nonzero().squeeze(1)
            if len(active) == 0:
                break
            at = tried[active]
            if step == steps:
                with torch.no_grad():
                    nearest.keep(active, at, model(at))
                break
            logits, delta = _to_the_nearest_boundary(model, at, y[active], likely[active], norm, targeted)
            nearest.keep(active, at, logits)
            total[active] += delta
            tried[active] = (x[active] + (1 + overshoot) * total[active]).clamp(0, 1)
        _shorten(model, nearest, halvings)
    return nearest.within()


@torch.no_grad()
def _shorten(model: Classifier, nearest: Nearest, halvings: int) -> None:
    """Halves the segment from each clean image to the one found, keeping the end that fools the model."""
    active = nearest.found()
    clean, found = nearest.clean[active], nearest.image[active]
    low, high = torch.zeros_like(nearest.size[active]), torch.ones_like(nearest.size[active])
    for _ in range(halvings if len(active) else 0):
        middle = (low + high) / 2
        at = torch.lerp(clean, found, middle.view(-1, 1, 1, 1))
        hit = nearest.keep(active, at, model(at))
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)


def _to_the_nearest_boundary(
    model: Classifier, x: Tensor, y: Tensor, likely: Tensor, norm: Norm, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the shortest δ that crosses a linearised boundary between y and a rival class.

    The rivals are `likely` (N, candidates), or the class ahead of the target y if `targeted`.
    """
    best, best_length = torch.zeros_like(x), x.new_full((len(x),), torch.inf)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        if targeted:
            likely = logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1, keepdim=True)
        for index in range(likely.shape[1]):
            rival = logits.gather(1, likely[:, index : index + 1]).squeeze(1)
            lead = own - rival if targeted else rival - own
            last = index == likely.shape[1] - 1
            gradient = input_gradient(lead, x, retain_graph=not last)
            gradient = gradient.nan_to_num(0, 0, 0)
            # To just where `Nearest` takes it for crossed.
            gap = (clearance(logits) - lead).detach().nan_to_num(0, 0, 0).to(x.dtype)
            delta = nearest_in_halfspace(x.detach(), gradient, gap, norm)
            gain = (gradient * delta).flatten(1).sum(1)
            # A boundary that the box keeps out of reach is as far as it would be at the same rate.
            length = sizes(norm, delta) * (gap / gain).clamp(min=1)
            length = torch.where(gain > 0, length, torch.inf)
            nearer = length < best_length
            best[nearer], best_length[nearer] = delta[nearer], length[nearer]
    return logits.detach(), best
