"""Multipliers of a constraint, one for each image, and the gradients that they weigh."""

from __future__ import annotations

from torch import Tensor

from manifold_defense.attacks.norms import geometry


def raised(multiplier: Tensor, violation: Tensor, rate: float) -> Tensor:
    """`max(0, λ + rate · violation)` (N,), the violation clipped to ±1.

    With a small rate the next multiplier of dual ascent, with a large one the weight at present, as
    in the augmented Lagrangian (Nocedal & Wright 2006, section 17.4). Below zero λ would reward whoever
    nears the constraint from inside; after an unclipped step it would take as long to come down.
    """
    return (multiplier + rate * violation.nan_to_num(1.0).clamp(-1, 1)).clamp(min=0)


def unit(gradient: Tensor) -> Tensor:
    """Each image's gradient (N, ...) at Euclidean length 1, so that neither the scale of the logits nor
    that of the constraint matters; zero, and what is not finite, stays zero."""
    return geometry("l2").steepest(gradient.nan_to_num(0, 0, 0))
