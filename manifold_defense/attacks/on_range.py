"""Search the generator's range inside the threat ball: what is found there, a projection leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.attacks.contract import attack
from manifold_defense.attacks.lagrange import unit
from manifold_defense.attacks.norms import column, geometry
from manifold_defense.attacks.objective import clearly, fooled, logits_and_gradient, margins
from manifold_defense.modes import evaluation_mode
from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.projection.solvers import SOLVERS
from manifold_defense.types import Classifier, Generator, Norm

# The weight of the distance to the ball, in radii: at first, its factor a step, and its bounds.
_WEIGHT, _FACTOR, _LEAST, _MOST = 10.0, 1.2, 1.0, 1e4
# The pull back is at most so much stronger than the climb, whose length is 1: Adam would remember the
# long way from a start outside for a hundred steps.
_STRONGEST = 2.0
# The ball that is aimed at is a little smaller: a penalty stops outside of what it bounds.
_AIM = 0.99
_BOX = (0.0, 1.0)
_ROUNDING = 1e-5


@attack
def range_attack(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    generator: Generator,
    z: Tensor | None = None,
    surrogate: Classifier | None = None,
    norm: Norm = "linf",
    eps: float = 0.3,
    steps: int = 100,
    restarts: int = 1,
    learning_rate: float = 0.1,
    spread: float = 0.5,
    strict: bool = False,
    targeted: bool = False,
    stop_early: bool = True,
    seed: int = 0,
) -> Tensor:
    """`max margin(f(G(z)))` s.t. `‖G(z) − x‖ ≤ eps` over z, for images (N, C, H, W) with labels y (N,).

    The reparameterisation break (Athalye, Carlini & Wagner 2018, section 4.4). The search starts at `z`
    (N, D), the images' projections, say, and in further restarts `spread` standard deviations away; without,
    at draws of the prior. `surrogate` f is differentiated on the range, by default `model` itself; behind a
    projection its classifier alone is cheaper and as good. What is handed in is G(z), moved onto the ball
    where it is outside (not if `strict`: then it does not count), and `model`, the deployed one, says
    whether it is fooled. Returned is the highest margin found, the clean image where nothing fools.
    """
    shape = geometry(norm)
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected steps ≥ 1, restarts ≥ 1, got {steps}, {restarts}")
    if z is not None and z.shape != (len(x), generator.latent_dim):
        raise ValueError(f"z: expected shape ({len(x)}, {generator.latent_dim}), got {tuple(z.shape)}")
    guide = model if surrogate is None else surrogate
    adam, config = SOLVERS["adam"], ProjectionConfig("adam", "prior", steps=steps, step_size=learning_rate)
    rng = torch.Generator().manual_seed(seed)
    x = x.detach()
    best = x.clone()

    with evaluation_mode(model), evaluation_mode(generator), evaluation_mode(guide):
        with torch.no_grad():
            logits = model(x)
        clean_margin = margins(logits, y, targeted)
        best_margin = torch.where(fooled(logits, y, targeted), clean_margin, -torch.inf).to(x.dtype)
        found = clearly(clean_margin, logits) & stop_early
        for restart in range(restarts):
            draw = torch.randn(1, generator.latent_dim, generator=rng).to(x)
            start = draw.expand(len(x), -1) if z is None else z.detach() + spread * draw * (restart > 0)
            active = (~found).nonzero().squeeze(1)
            state = adam.init(start[active].clone(), config)
            weight = x.new_full((len(active),), _WEIGHT)
            for step in range(steps + 1):
                if len(active) == 0:
                    break
                clean, label = x[active], y[active]
                with torch.enable_grad():
                    point = state[0].detach().requires_grad_(True)
                    image = generator(point)
                    tried = shape.place(clean, image, eps, _BOX)
                drawn, handed = image.detach(), tried.detach()
                with torch.no_grad():
                    logits = model(handed)
                margin = margins(logits, label, targeted)
                better = fooled(logits, label, targeted) & (margin > best_margin[active])
                if strict:
                    better &= (handed - drawn).flatten(1).abs().amax(1) <= _ROUNDING
                best[active[better]] = handed[better]
                best_margin[active[better]] = margin[better].to(x.dtype)
                going = ~(clearly(margin, logits) & better & stop_early)
                found[active] |= ~going
                if step < steps:
                    _, climb = logits_and_gradient(guide, handed, label, "margin", targeted)
                    # Through the placing: what leaves the ball gains nothing, and is only pulled back.
                    (climb,) = torch.autograd.grad(tried, image, climb, retain_graph=True)
                    outward = drawn - shape.place(clean, drawn, _AIM * eps, _BOX)
                    length = weight * torch.linalg.vector_norm(outward.flatten(1), dim=1) / max(eps, 1e-30)
                    cotangent = column(length.clamp(max=_STRONGEST), image) * unit(outward) - unit(climb)
                    (gradient,) = torch.autograd.grad(image, point, cotangent)
                    with torch.no_grad():
                        state = adam.step(state, margin, gradient.nan_to_num(0, 0, 0), step, config)
                    outside = shape.size(drawn - clean) > eps
                    weight = torch.where(outside, weight * _FACTOR, weight / _FACTOR).clamp(_LEAST, _MOST)
                active, weight = active[going], weight[going]
                state = tuple(entry[going] for entry in state)
    return best
