"""HopSkipJump: an attack that sees predicted labels only (Chen, Jordan & Wainwright 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import fooled
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Norm

_NOISES = 40  # images that are tried as starts, the same for all
_HALVINGS = 8  # at most, of a step that leaves the adversarial side
_PROBES = 512  # how many images are asked at once, unless the caller's batch is larger

# (images (M, C, H, W), labels (M,)) to whether each is adversarial, (M,)
Oracle = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
@attack
def hop_skip_jump(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "l2",
    eps: float = float("inf"),
    queries: int = 2500,
    draws: int = 100,
    restarts: int = 1,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """The nearest adversarial image found by HopSkipJump (Algorithm 2) in L2 or L∞.

    Images (N, C, H, W), labels y (N,). Of the model nothing but the predicted labels is used, `queries`
    times for each image and restart (never fewer than the some eighty that find a start), of which
    `draws · √t` for the direction of step t. A walk starts from noise or another image of the
    batch, if that is predicted as wanted; targeted, noise seldom is. An image for which nothing
    within `eps` was found is returned unchanged. With a finite `eps` an image leaves the batch
    as soon as one is found (`stop_early`), and is pushed on to the edge of the ball if it is
    adversarial there too: nearer is not better within the ball. Where the model rounds its input the
    probes are shorter than a level, and the direction is little more than noise.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: expected one of linf, l2, got {norm!r}")
    if queries < 1 or draws < 1 or restarts < 1:
        raise ValueError(f"expected queries, draws, restarts ≥ 1, got {queries}, {draws}, {restarts}")
    size = geometry(norm).size
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    best, best_size = x.clone(), x.new_full((len(x),), torch.inf)
    enough = eps if stop_early and not math.isinf(eps) else 0.0

    def ask(images: Tensor, labels: Tensor) -> Tensor:
        return fooled(model(images), labels, targeted)

    with evaluation_mode(model):
        wrong = ask(x, y)
        best_size[wrong] = 0
        for restart in range(restarts):
            current, reached = _starts(model, ask, x, y, _noises(x, rng), restart, norm, targeted)
            nearer = reached < best_size
            best[nearer], best_size[nearer] = current[nearer], reached[nearer]
            left = queries - _NOISES - 2 * _bisections(x)
            for step in count(1):
                active = ((best_size > enough) & reached.isfinite()).nonzero().squeeze(1)
                left -= _HALVINGS + _bisections(x)
                if len(active) == 0 or left < 1:
                    break
                probes = min(int(draws * math.sqrt(step)), left)
                left -= probes
                # All images share the directions, so that none depends on which others are still there.
                noise = torch.randn(probes, *x.shape[1:], generator=rng).to(x)
                at, clean, label = current[active], x[active], y[active]
                direction = geometry(norm).steepest(_direction(ask, at, clean, label, noise))
                at = _leap(ask, at, direction, size(at - clean) / math.sqrt(step), label)
                at = _to_the_boundary(ask, at, clean, label, norm)
                distance = size(at - clean)
                nearer = distance < best_size[active]
                current[active] = at
                best[active[nearer]], best_size[active[nearer]] = at[nearer], distance[nearer]
        missed = best_size > eps
        best[missed] = x[missed]
        if not math.isinf(eps):
            scale = (eps / best_size).nan_to_num(0, 0, 0).view(-1, 1, 1, 1)
            edge = (x + geometry(norm).project((best - x) * scale, eps)).clamp(0, 1)
            farther = ask(edge, y) & ~missed & ~wrong
            best[farther] = edge[farther]
    return best


def _starts(
    model: Classifier,
    ask: Oracle,
    x: Tensor,
    y: Tensor,
    noises: Tensor,
    restart: int,
    norm: str,
    targeted: bool,
) -> tuple[Tensor, Tensor]:
    """For each image an adversarial one at the boundary and its distance, (N,); infinite if there is none.

    The nearer of two: from the nearest noise that is predicted as wanted, and from the nearest such
    image of the batch; the next nearest at each restart.
    """
    best, distance = x.clone(), x.new_full((len(x),), torch.inf)
    for pool, rank in ((noises, 0), (x, restart)):
        logits = model(pool)
        # What is not finite is no prediction, as in `fooled`: never right and never the target.
        predicted = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
        fits = (predicted == y.unsqueeze(1)) == targeted  # (N, M)
        found = fits.any(1).nonzero().squeeze(1)
        if len(found) == 0:
            continue
        clean, label, fits = x[found], y[found], fits[found]
        apart = torch.cdist(clean.flatten(1), pool.flatten(1), p=2.0 if norm == "l2" else math.inf)
        order = torch.where(fits, apart, torch.inf).argsort(1)
        nearest = order.gather(1, (fits.sum(1, keepdim=True) - 1).clamp(max=rank)).squeeze(1)
        start = _to_the_boundary(ask, pool[nearest], clean, label, norm)
        length = geometry(norm).size(start - clean)
        nearer = length < distance[found]
        best[found[nearer]], distance[found[nearer]] = start[nearer], length[nearer]
    return best, distance


def _noises(x: Tensor, rng: torch.Generator) -> Tensor:
    """Uniform noise, and black and white at four scales: a network calls all fine noise one class."""
    images = []
    for index in range(_NOISES):
        scale = index % 5
        shape = (1, x.shape[1], *[max(length >> max(scale - 1, 0), 1) for length in x.shape[2:]])
        image = torch.rand(shape, generator=rng)
        images.append(F.interpolate(image.round() if scale else image, x.shape[2:]))
    return torch.cat(images).to(x)


def _bisections(x: Tensor) -> int:
    """Until the bracket is P^−1.5 of the distance (section 4: θ), or what float32 resolves."""
    return min(math.ceil(1.5 * math.log2(max(x.shape[1:].numel(), 2))), 20)


def _to_the_boundary(ask: Oracle, at: Tensor, clean: Tensor, label: Tensor, norm: str) -> Tensor:
    """The adversarial end of a bisection between `at`, which is adversarial, and `clean` (Algorithm 1)."""
    delta = at - clean
    length = geometry(norm).size(delta).view(-1, 1, 1, 1)
    low, high = torch.zeros_like(length), torch.ones_like(length)
    for _ in range(_bisections(clean)):
        middle = (low + high) / 2
        # In L2 a share of the way; in L∞ what the smaller cube leaves of δ.
        part = middle * delta if norm == "l2" else delta.clamp(-middle * length, middle * length)
        tried = (clean + part).clamp(0, 1)
        hit = ask(tried, label).view(-1, 1, 1, 1)
        at = torch.where(hit, tried, at)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    return at


def _direction(ask: Oracle, at: Tensor, clean: Tensor, label: Tensor, noise: Tensor) -> Tensor:
    """`Σ_b (φ_b − φ̄) u_b` (eq. 16): towards the adversarial side of the boundary at `at` (N, C, H, W).

    φ_b is 1 where `at` + radius · u_b is adversarial, else −1; u_b is `noise` (B, C, H, W) at length 1.
    """
    # δ = √P θ ‖x − x*‖ with θ = P^−1.5. The paper's radius in L∞, √P shorter, is lost in float32.
    radius = (geometry("l2").size(at - clean) / clean.shape[1:].numel()).clamp(min=1e-6).view(-1, 1, 1, 1)
    weighted, total = torch.zeros_like(at), torch.zeros_like(at)
    agreed = at.new_zeros(len(at))
    units = geometry("l2").steepest(noise).unsqueeze(1)
    for part in units.split(max(_PROBES // len(at), 1)):
        probes = (at + radius * part).clamp(0, 1)  # (B, N, C, H, W)
        hits = ask(probes.flatten(0, 1), label.repeat(len(part))).view(len(part), -1)
        phi = hits.to(at) * 2 - 1
        moved = (probes - at) / radius  # what clipping leaves of u
        weighted += (phi.view(*phi.shape, 1, 1, 1) * moved).sum(0)
        total += moved.sum(0)
        agreed += phi.sum(0)
    mean = (agreed / len(noise)).view(-1, 1, 1, 1)
    # All on one side: no baseline to subtract.
    return torch.where(mean.abs() == 1, weighted, weighted - mean * total)


def _leap(ask: Oracle, at: Tensor, direction: Tensor, length: Tensor, label: Tensor) -> Tensor:
    """`at` moved along `direction`, by the first of length, length / 2, … that stays adversarial."""
    moved, waiting = at.clone(), torch.arange(len(at), device=at.device)
    for halving in range(_HALVINGS):
        step = (length[waiting] / 2**halving).view(-1, 1, 1, 1)
        tried = (at[waiting] + step * direction[waiting]).clamp(0, 1)
        hit = ask(tried, label[waiting])
        moved[waiting[hit]] = tried[hit]
        waiting = waiting[~hit]
        if len(waiting) == 0:
            break
    return moved
