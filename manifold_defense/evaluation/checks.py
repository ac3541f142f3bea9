"""Signs that a robustness figure is an artefact of masked gradients, not a defence.

Each check returns one line for every finding, and nothing when all is well (Carlini et al. 2019;
Athalye, Carlini & Wagner 2018, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from manifold_defense.attacks.objective import evaluation_mode, logits_and_gradient
from manifold_defense.evaluation.evaluate import Row
from manifold_defense.types import Classifier

# Weak to strong; a stronger attack may not leave more images robust, beyond one in a hundred.
_ORDER, _TOLERANCE = ("noise", "fgsm", "pgd"), 0.01


def order(rows: Sequence[Row]) -> list[str]:
    """`noise ≥ fgsm ≥ pgd` in robust accuracy, each attack at its strongest view."""
    strongest: dict[tuple[str, str | None, float], dict[str, float]] = {}
    for r in rows:
        attack = r.attack.removesuffix("-margin")
        if attack in _ORDER:
            cell = strongest.setdefault((r.defence, r.norm, r.eps), {})
            cell[attack] = min(cell.get(attack, 1.0), r.robust_accuracy)
    findings = []
    for (defence, norm, eps), cell in strongest.items():
        present = [name for name in _ORDER if name in cell]
        for weak, strong in pairwise(present):
            if cell[strong] > cell[weak] + _TOLERANCE:
                findings.append(
                    f"{defence}, {norm} {eps:g}: {strong} leaves {cell[strong]:.1%} robust, "
                    f"more than the weaker {weak} with {cell[weak]:.1%}"
                )
    return findings


def views(rows: Sequence[Row]) -> list[str]:
    """What the views of a filtered defence give away.

    The exact gradient must be among the attacked views, and PGD through it must not be weaker than
    PGD that approximates or ignores the filter: then it is stuck, and the filter only looks strong.
    """
    findings = []
    filtered = {r.defence for r in rows if r.view not in (None, "exact", "all")}
    for defence in sorted(filtered):
        own = [r for r in rows if r.defence == defence]
        for norm, eps in dict.fromkeys((r.norm, r.eps) for r in own if r.norm):
            pgd = {
                r.view: r.robust_accuracy for r in own if (r.norm, r.eps) == (norm, eps) and r.attack == "pgd"
            }
            if "exact" not in pgd:
                findings.append(f"{defence}, {norm} {eps:g}: no PGD through the exact gradient of the filter")
            elif pgd["exact"] > min(pgd.values()) + _TOLERANCE:
                findings.append(
                    f"{defence}, {norm} {eps:g}: PGD through the exact gradient leaves {pgd['exact']:.1%} "
                    f"robust, a weaker view {min(pgd.values()):.1%}"
                )
    return findings


def dead_gradients(name: str, model: Classifier, x: Tensor, y: Tensor) -> list[str]:
    """Images (N, C, H, W) whose margin has a zero or non-finite gradient under `model`."""
    with evaluation_mode(model):
        try:
            _, gradient = logits_and_gradient(model, x, y, "margin", targeted=False)
        except RuntimeError as error:  # the graph is cut: a detached filter, or one under no_grad
            return [f"{name}: the gradient is missing on {len(x)} of {len(x)} images ({error})"]
    flat = gradient.flatten(1)
    dead = (~torch.isfinite(flat).all(1)) | (flat.abs().amax(1) == 0)
    if not dead.any():
        return []
    return [f"{name}: the gradient is zero or not finite on {int(dead.sum())} of {len(x)} images"]
