"""What every gradient attack shares: a loss to raise, its gradient, and what counts as success."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manifold_defense.types import Classifier

Objective = Callable[[Tensor], Tensor]  # logits (N, K) to what is raised, (N,)


def fooled(logits: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """Whether each prediction (N, K) is what the attacker wants, (N,): not y, or y if targeted.

    An answer that is not finite is no prediction: never right, never the target.
    """
    hit = correct(logits, y)
    return hit if targeted else ~hit


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each prediction (N, K) is y, (N,); NaN or infinity among the logits is wrong."""
    _check(logits, y)
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def margins(logits: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """`max_{i≠y} Z_i − Z_y` of logits (N, K), (N,): above zero where the model errs; negated if targeted."""
    _check(logits, y)
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    margin = own - others if targeted else others - own
    # A model that answers NaN has been fooled, and has not been steered to a target.
    return torch.where(logits.isfinite().all(1), margin, -torch.inf if targeted else torch.inf)


def attack_loss(logits: Tensor, y: Tensor, loss: str, targeted: bool) -> Tensor:
    """What the attacker raises, (N,): cross-entropy (`ce`), the margin (`margin`), or its ratio (`dlr`).

    Cross-entropy is climbed as the log-odds `log Σ_{i≠y} exp Z_i − Z_y = log(exp(CE) − 1)`, which rise with
    it in the same direction. Its own gradient is the probability of being wrong times theirs: rounded away
    digit by digit where the model is sure, and in float32 zero beyond a lead of a hundred. The difference
    of logits ratio `(max_{i≠y} Z_i − Z_y) / (Z_π1 − Z_π3)` does not change with their scale either
    (Croce & Hein 2020, eq. 6); with two classes, which have no third, it is the margin.
    """
    _check(logits, y)
    if loss == "margin":
        return margins(logits, y, targeted)
    if loss == "dlr":
        return margins(logits, y, targeted) / _spread(logits, 3)
    if loss != "ce":
        raise ValueError(f"loss: expected ce, margin or dlr, got {loss!r}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    value = others.logsumexp(1) - logits.gather(1, y.unsqueeze(1)).squeeze(1)
    return -value if targeted else value


def _check(logits: Tensor, y: Tensor) -> None:
    """Raise TypeError for what are no logits or no labels, ValueError for labels of classes beyond."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits (N, K), got {got}")
    if logits.shape[1] < 2:
        raise TypeError(f"model: expected logits of two classes or more, got shape {tuple(logits.shape)}")
    if y.dtype != torch.int64 or y.shape != logits.shape[:1]:
        raise TypeError(f"y: expected int64 labels ({len(logits)},), got {y.dtype} {tuple(y.shape)}")
    if len(y) and int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels: expected below {logits.shape[1]}, the classes of the model, got {int(y.max())}"
        )


def goals(logits: Tensor, y: Tensor, target_classes: int, targeted: bool) -> Sequence[Tensor | None]:
    """Where the runs of a restart lead: to each of so many likely wrong classes (N,), or if 0 to any."""
    if target_classes and targeted:
        raise ValueError("target_classes: expected 0 for an attack that is targeted already")
    return likely_wrong(logits, y, target_classes) or [None]


def objective(y: Tensor, loss: str, targeted: bool, goal: Tensor | None) -> Objective:
    """What a run raises for labels y (N,): `attack_loss`, or the way to the classes `goal` (N,)."""
    if goal is None:
        return lambda logits: attack_loss(logits, y, loss, targeted)
    return lambda logits: towards(logits, y, goal)


def towards(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """`(Z_t − Z_y) / (Z_π1 − (Z_π3 + Z_π4) / 2)`, (N,): the targeted ratio (Croce & Hein 2020, eq. 7).

    It leads from y (N,) to the class t (N,). With fewer than four classes it is the difference alone: a
    ratio to the least of three is constant where t is the least.
    """
    pair = logits.gather(1, torch.stack([y, target], 1))
    return (pair[:, 1] - pair[:, 0]) / _spread(logits, 4)


def _spread(logits: Tensor, rank: int) -> Tensor:
    """From the largest logit to the third, or half-way to the fourth, (N,); 1 if there are not as many."""
    if logits.shape[1] < rank:
        return torch.ones_like(logits[:, 0])
    top = logits.topk(rank, dim=1).values
    return (top[:, 0] - (top[:, 2] + top[:, -1]) / 2).clamp(min=1e-12)


def clearly(margin: Tensor, logits: Tensor) -> Tensor:
    """Whether a margin (N,) of logits (N, K) is beyond what another batch's rounding can undo, (N,)."""
    return margin > 1e-4 * contested(logits)


def contested(logits: Tensor) -> Tensor:
    """The size (N,) of the two largest of logits (N, K), whose difference decides.

    That of a class that a constant has switched off does not count.
    """
    return logits.nan_to_num(0, 0, 0).topk(2, dim=1).values.abs().amax(1)


def likely_wrong(logits: Tensor, y: Tensor, count: int) -> list[Tensor]:
    """The `count` likeliest classes (N,) of logits (N, K) that are not y, as many as there are."""
    wrong = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
    return list(wrong[:, : min(count, logits.shape[1] - 1)].unbind(1))


def input_gradient(value: Tensor, x: Tensor, *, retain_graph: bool = False) -> Tensor:
    """`∂ Σ value / ∂x`; zero where no graph leads from x to it: a model that hides its gradient.

    RuntimeError where nobody could record one, which would pass every model off as such.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("attacks need gradients: expected no torch.inference_mode() around them")
    if not value.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def logits_and_gradient(
    model: Classifier, x: Tensor, y: Tensor, loss: str | Objective, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the gradient of the loss in x (N, C, H, W), leaving no trace on the model.

    The gradient is zero where the model hides it.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        value = attack_loss(logits, y, loss, targeted) if isinstance(loss, str) else loss(logits)
        gradient = input_gradient(value, x)
    return logits.detach(), gradient
