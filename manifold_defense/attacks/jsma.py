"""The Jacobian-based saliency map attack in L0 (Papernot et al. 2016)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.minimum_norm import Nearest
from manifold_defense.attacks.objective import input_gradient
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

# Pairs are formed among so many features, those that gain most alone: all pairs would be P² per image.
_PAIRED = 128


@attack
def jsma(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l0",
    eps: float | None = None,
    theta: float = 1.0,
    pairs: bool = True,
    targeted: bool = False,
    seed: int = 0,
) -> Tensor:
    """Images (N, C, H, W) with a few pixels changed until they fool the model, for labels (N,).

    Algorithm 2 of Papernot et al. (2016) with the saliency maps of equations 8 and 9 (increasing and
    decreasing) in one: each iteration moves the two features, or with `pairs` False the one, by
    ±`theta` at most, for which `(Δ Z_t)·|Δ Σ_{j≠t} Zⱼ|` is largest, where the first rises and the
    second falls; Δ is linearised and as far as the box lets the feature move. If there are none such,
    those for which Z_t gains most on the others. t is the target, or else the wrong class that is
    ahead. `eps` is how many pixels may change, whatever their channels; by default a tenth of H·W. A
    feature that was moved is moved only the same way again.

    Greedy, so not the fewest pixels: `fmn` in L0 often finds fewer. An image that is not fooled within
    `eps` is returned unchanged. Nothing is random: `seed` is there for the common signature.
    """
    if norm != "l0":
        raise ValueError(f"jsma: expected norm l0, got {norm!r}")
    pixels = x.shape[2:].numel()
    eps = max(1.0, math.floor(0.1 * pixels)) if eps is None else eps
    if not 0 < theta <= 1:
        raise ValueError(f"theta: expected in (0, 1], got {theta}")
    x = x.detach()
    budget = int(min(eps, pixels))

    with evaluation_mode(model):
        nearest = Nearest(model, x, y, norm=norm, eps=eps, targeted=targeted)
        current, stuck = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        # Each iteration uses up a feature by theta at least, or leaves its image stuck.
        for _ in range(budget * x.shape[1] * math.ceil(1 / theta) + 1):
            active = (~nearest.size.isfinite() & ~stuck).nonzero().squeeze(1)
            if len(active) == 0:
                break
            at, clean = current[active], x[active]
            logits, own, others = _jacobian(model, at, y[active], targeted)
            hit = nearest.keep(active, at, logits)
            moved = _salient(at, clean, own, others, theta, budget, pairs)
            stuck[active] |= hit | (moved == 0).flatten(1).all(1)
            current[active] = (at + moved).clamp(0, 1)
    return nearest.within()


def _jacobian(model: Classifier, x: Tensor, y: Tensor, targeted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, K), the gradient of Z_t and that of `Σ_{j≠t} Zⱼ`, (N, C, H, W) each."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        towards = y if targeted else logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
        chosen = logits.gather(1, towards.unsqueeze(1))
        own = input_gradient(chosen, x, retain_graph=True)
        everything = input_gradient(logits, x)
    own, everything = own.nan_to_num(0, 0, 0), everything.nan_to_num(0, 0, 0)
    return logits.detach(), own, everything - own


def _salient(
    at: Tensor, clean: Tensor, own: Tensor, others: Tensor, theta: float, budget: int, pairs: bool
) -> Tensor:
    """The next change of each image, (N, C, H, W), within the budget of pixels; 0 if none gains."""
    n, features = len(at), at.shape[1:].numel()
    touched = (at != clean).any(1, keepdim=True)
    left = (budget - touched.flatten(1).sum(1)).view(-1, 1, 1)  # pixels that may still be touched
    up = torch.where(at < clean, 0, (1 - at).clamp(max=theta))
    down = torch.where(at > clean, 0, at.clamp(max=theta))
    move = torch.stack([up, -down], 1).reshape(n, 2 * features)
    # What each move does, linearised: raises Z_t, lowers the others; on one scale, as they are K − 1.
    gain = _scaled(move * own.flatten(1).repeat(1, 2))
    loss = _scaled(-move * others.flatten(1).repeat(1, 2))
    total = torch.where(move != 0, gain + loss, -torch.inf)

    order = total.topk(min(_PAIRED, 2 * features), dim=1).indices  # (N, M)
    gain, loss, total = (values.gather(1, order) for values in (gain, loss, total))
    pixel = order % features % at.shape[2:].numel()
    new = (~touched).flatten(1).gather(1, pixel)
    # (N, M, M): the effects of pairs; of one feature on the diagonal, where no pair fits into the budget.
    alone = torch.eye(order.shape[1], dtype=torch.bool, device=at.device)
    both = [torch.where(alone, v.unsqueeze(1), v.unsqueeze(1) + v.unsqueeze(2)) for v in (gain, loss, total)]
    same = pixel.unsqueeze(1) == pixel.unsqueeze(2)
    cost = new.unsqueeze(1).long() + torch.where(same, 0, new.unsqueeze(2).long())
    opposite = (order.unsqueeze(1) % features == order.unsqueeze(2) % features) & ~alone
    possible = (cost <= left) & ~opposite & both[2].isfinite() & (alone | pairs)
    # Equation 8 first (products of shares are at most 4); without a pair of the right signs, the sum.
    salient = torch.where((both[0] > 0) & (both[1] > 0), 4 + both[0] * both[1], both[2])
    best, index = torch.where(possible, salient, -torch.inf).flatten(1).max(1)
    index = index.unsqueeze(1)
    chosen = torch.cat([order.gather(1, index // order.shape[1]), order.gather(1, index % order.shape[1])], 1)
    change = torch.zeros_like(move).scatter(1, chosen, move.gather(1, chosen))
    change = torch.where((best > 0).unsqueeze(1), change, 0)
    return change.view(n, 2, features).sum(1).view_as(at)


def _scaled(effect: Tensor) -> Tensor:
    """Each row as shares of its largest entry."""
    largest = effect.abs().amax(1, keepdim=True)
    return effect / torch.where(largest > 0, largest, 1.0)
