"""What every gradient attack shares: a quiet model, a loss to raise, and what counts as success."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifold_defense.types import Classifier


@contextmanager
def evaluation_mode(model: Classifier) -> Iterator[None]:
    """Eval mode for the time of an attack; every submodule gets its own mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def fooled(logits: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """Whether each prediction (N, K) is what the attacker wants, (N,): not y, or y if targeted.

    An answer that is not finite is no prediction: never right, never the target.
    """
    hit = correct(logits, y)
    return hit if targeted else ~hit


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each prediction (N, K) is y, (N,); NaN or infinity among the logits is wrong."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def margins(logits: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """`max_{i≠y} Z_i − Z_y` of logits (N, K), (N,): above zero where the model errs; negated if targeted."""
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    margin = own - others if targeted else others - own
    # A model that answers NaN has been fooled, and has not been steered to a target.
    return torch.where(logits.isfinite().all(1), margin, -torch.inf if targeted else torch.inf)


def attack_loss(logits: Tensor, y: Tensor, loss: str, targeted: bool) -> Tensor:
    """What the attacker raises, (N,): cross-entropy (`ce`) or the margin (`margin`).

    Cross-entropy vanishes in float32 where logits are large; the margin does not.
    """
    if loss == "margin":
        return margins(logits, y, targeted)
    if loss != "ce":
        raise ValueError(f"loss: expected ce or margin, got {loss!r}")
    value = F.cross_entropy(logits, y, reduction="none")
    return -value if targeted else value


def logits_and_gradient(
    model: Classifier, x: Tensor, y: Tensor, loss: str, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the gradient of the loss in x (N, C, H, W), leaving no trace on the model."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        value = attack_loss(logits, y, loss, targeted)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return logits.detach(), gradient
