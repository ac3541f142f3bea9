"""Signs that a robustness figure is an artefact of masked gradients, not a defence.

Each check is a small function of a defence, a threat and a few images, with a figure and a verdict
(Athalye, Carlini & Wagner 2018, section 3.1; Carlini et al. 2019; Croce et al. 2022). What a check
measures is its own: it does not depend on which attacks an evaluation runs. A failed one says that
the defence's figures are no robustness figures; passing all proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from manifold_defense.attacks import geometry
from manifold_defense.attacks.norms import column
from manifold_defense.attacks.objective import contested, correct, margins
from manifold_defense.evaluation.defence import NO_GRADIENT, Defence
from manifold_defense.evaluation.outcome import attack_images
from manifold_defense.evaluation.plan import Job
from manifold_defense.evaluation.recipe import SPECS, AttackConfig
from manifold_defense.evaluation.subject import Check, Subject, change_of, lead, share_of
from manifold_defense.modes import evaluation_mode
from manifold_defense.rejection import RejectingClassifier
from manifold_defense.types import Ball, Classifier, Norm, Threat

# By how much two shares of a few dozen images may differ by chance.
_TOLERANCE = 0.05
# Longer attacks on what was left, by norm. Logits whose scale follows the input lead a loss astray: DLR, a
# ratio of their differences, has no scale, and HopSkipJump sees labels alone.
_IN_BALL = (
    AttackConfig("apgd", 100),
    AttackConfig("apgd", 100, loss="dlr"),
    AttackConfig("window_pgd", 20, 3),
    AttackConfig("fab", 50, 2, targets=3),
)
_BY_LABELS = AttackConfig("hop_skip_jump", 2500)
_LAST: Mapping[Norm, tuple[AttackConfig, ...]] = {
    "linf": (*_IN_BALL, _BY_LABELS),
    "l2": (*_IN_BALL, _BY_LABELS),
    "l1": _IN_BALL,
    "l0": (
        AttackConfig("pgd_l0", 50, 3, "both"),
        AttackConfig("stroke_search", restarts=2),
        AttackConfig("sparse_rs", 6000),
    ),
    "patch": (AttackConfig("patch", 40, 3, "both"),),
    "corruption": (AttackConfig("corruption", 10),),
}
_LAST_REFUSED = (AttackConfig("detector_aware", 100, 4),)
# Under these threats every check is asked, under others whether the attacks have converged.
EXAMINED: tuple[Norm, ...] = ("linf", "l2")
_BALLS: tuple[Norm, ...] = get_args(Ball)
_STAND_IN = Threat("linf", 0.1)
_FALL = 0.02  # by how much those longer attacks may lower a figure
_HALVINGS = 16  # of a way between two images: a step of float32 is some ten more


def gradient(s: Subject) -> Check:
    """Is there a gradient at all?"""
    flat = s.gradient(s.x).flatten(1)
    dead = (~flat.isfinite().all(1)) | (flat.abs().amax(1) == 0)
    share = share_of(dead)
    words = f"the gradient is zero or not finite on {int(dead.sum())} of {len(dead)} images"
    return s.verdict("gradient", share, share < _TOLERANCE, words)


def slope(s: Subject) -> Check:
    """Is it the gradient of what is deployed? Autograd against a central difference along it."""
    h = 0.01
    x = s.x.clamp(h, 1 - h)  # room for a step to either side
    g = s.gradient(x)
    size = geometry("l2").size(g)
    u = geometry("l2").steepest(g.nan_to_num(0, 0, 0))
    ends = [margins(s.logits(x + sign * h * u), s.y, targeted=False) for sign in (1, -1)]
    ratio = (ends[0] - ends[1]) / (2 * h) / size.clamp(min=1e-12)
    share = share_of((ratio > 0.5) & (ratio < 2))
    words = f"the gradient predicts the slope of the loss on {share:.0%} of the images only"
    return s.verdict("slope", share, share > 0.7, words)


def stability(s: Subject) -> Check:
    """Does the gradient point the same way a hair away? Shattered ones do not."""
    x = s.x.clamp(0.01, 0.99)
    rng = torch.Generator().manual_seed(s.seed)
    nearby = x + geometry("l2").project(torch.randn(x.shape, generator=rng).to(x), 0.01)
    a, b = (s.gradient(at).nan_to_num(0, 0, 0).flatten(1) for at in (x, nearby.clamp(0, 1)))
    cosine = float(F.cosine_similarity(a, b).mean())
    words = f"the gradient turns within 0.01 of an image: mean cosine {cosine:.2f}"
    return s.verdict("stability", cosine, cosine >= 0.5, words)


def probabilities(s: Subject) -> Check:
    """Logits, or probabilities, whose loss saturates?"""
    z = s.logits(s.x)
    are = bool(((z >= 0) & (z <= 1)).all() and ((z.sum(1) - 1).abs() < 1e-3).all())
    return s.verdict("probabilities", float(are), not are, "the model returns probabilities, not logits")


def saturation(s: Subject) -> Check:
    """Does the cross-entropy still have a gradient in float32?"""
    z = s.logits(s.x).detach().float().requires_grad_(True)
    with torch.enable_grad():
        (g,) = torch.autograd.grad(F.cross_entropy(z, s.y, reduction="sum"), z)
    share = share_of(g.abs().amax(1) == 0)
    words = f"the logits are so large that cross-entropy has no gradient on {share:.0%} of the images"
    return s.verdict("saturation", share, share < _TOLERANCE, words)


def offset(s: Subject) -> Check:
    """Are the logits far from zero, where float32 has no digits left for their differences?"""
    logits = s.logits(s.x)
    size, difference = float(contested(logits).median()), float(lead(logits))
    words = f"the logits lie {size:.0f} away from zero: losses lose precision"
    return s.verdict("offset", size, size <= max(5 * difference, min(50, 800 * difference)), words)


def randomness(s: Subject) -> Check:
    """Does the same input give the same answer? If not, its gradients must be averaged."""
    first = s.logits(s.x)
    change = max(change_of(first, s.logits(s.x)) for _ in range(4))
    words = f"answers to the same image differ, by {change:.1%} of their lead: average over draws"
    return s.verdict("randomness", change, change <= 1e-3, words)


def batch(s: Subject) -> Check:
    """Does an image's answer depend on the images beside it?"""
    few = s.x[:8]
    together = s.logits(few)
    among_others = together.clone()
    for i in range(len(few)):  # in its own place: a model that draws draws by place
        others = 1 - few
        others[i] = few[i]
        among_others[i] = s.logits(others)[i]
    # What draws may give a batch of another size other draws.
    sizes = (1, 2, 4, len(s.x)) if s.defence.draws == 1 else ()
    others_asked = [s.logits(s.x[:size])[: len(few)] for size in sizes]
    change = max(change_of(together[: len(z)], z) for z in (among_others, *others_asked))
    words = f"answers depend on the rest of the batch, by {change:.1%} of their lead"
    return s.verdict("batch", change, change <= 0.01, words)


def memory(s: Subject) -> Check:
    """Does the model answer as it would if it had never been asked before?

    Asked of a copy from before, and of the model itself before and after other images.
    """
    if s.defence.draws > 1 or s.unused is None:
        return s.verdict("memory", 0.0, True, "not asked")
    if s.unused is s.defence.model:
        words = "it cannot be copied, so that nobody can tell whether it remembers what it was asked"
        return s.verdict("memory", 1.0, False, words)
    x_adv = s.adversarial("pgd")
    between = (s.x + s.x.flip(0)) / 2
    before, _, after = s.logits(between), s.logits(1 - between), s.logits(between)
    with torch.no_grad(), evaluation_mode(s.unused):
        change = max(change_of(s.logits(x_adv), s.unused(x_adv)), change_of(before, after))
    words = f"answers depend on what was asked before, by {change:.1%} of their lead"
    return s.verdict("memory", change, change <= 0.01, words)


def recording(s: Subject) -> Check:
    """Does it answer those who want a gradient as it answers those who do not?"""
    change = 0.0
    if s.defence.draws == 1:
        with torch.enable_grad(), evaluation_mode(s.defence.model):
            recorded = s.defence.model(s.x.clone().requires_grad_(True)).detach()
        change = change_of(s.logits(s.x), recorded)
    words = f"answers differ when a gradient is wanted, by {change:.1%} of their lead"
    return s.verdict("recording", change, change <= 0.01, words)


def jump(s: Subject) -> Check:
    """Is an image as it is stored answered like one a thousandth of the grey scale beside it?

    If not, attacks climb another function than that which the images, on their grid, meet.
    """
    rng = torch.Generator().manual_seed(s.seed)
    nearby = (s.x + 1e-3 * (2 * torch.rand(s.x.shape, generator=rng).to(s.x) - 1)).clamp(0, 1)
    here, there = s.logits(s.x), s.logits(nearby)
    jumps = ((here - there).abs().nan_to_num(torch.inf) / lead(here)).amax(1) > 0.1
    predicted, beside = s.predicted(s.x), s.predicted(nearby)
    if predicted is not None and beside is not None:
        jumps |= (beside < 0) & (predicted >= 0)
    share = share_of(jumps)
    words = f"{int(jumps.sum())} of {len(jumps)} images are answered otherwise a thousandth beside them"
    return s.verdict("jump", share, share < _TOLERANCE, words)


def edge(s: Subject) -> Check:
    """Does the margin vanish where the label changes? That of labels on some other surface does not.

    Where that is, is found by labels alone, on the way from an image to the nearest other that is called
    otherwise, of those at hand and their negatives.
    """
    pool = torch.cat([s.x, 1 - s.x])
    apart = torch.cdist(s.x.flatten(1), pool.flatten(1))
    apart[s.y.unsqueeze(1) == s.logits(pool).argmax(1)] = torch.inf
    distance, nearest = apart.min(1)
    at = distance.isfinite().nonzero()[:, 0]
    if len(at) == 0:
        return s.verdict("edge", 0.0, True, "no label changes")
    clean, y = s.x[at], s.y[at]
    right, wrong = clean, pool[nearest[at]]
    for _ in range(_HALVINGS):
        middle = (right + wrong) / 2
        fits = column(correct(s.logits(middle), y), middle)
        right, wrong = torch.where(fits, middle, right), torch.where(fits, wrong, middle)
    before, beyond, whole = (
        -margins(s.logits(images), y, targeted=False) for images in (right, wrong, clean)
    )
    jumps = before - beyond > 0.1 * whole
    share = share_of(jumps)
    words = (
        f"where labels change, the margin of {int(jumps.sum())} of {len(at)} images jumps, not falls to zero"
    )
    return s.verdict("edge", share, share < 2 * _TOLERANCE, words)


def rule(s: Subject) -> Check:
    """Does an attack know by which rule the model refuses images?"""
    unknown = s.defence.predict is not None and not isinstance(s.defence.strongest, RejectingClassifier)
    words = "it refuses images by a rule that no attack here knows"
    return s.verdict("rule", float(unknown), not unknown, words)


def order(s: Subject) -> Check:
    """noise ≥ FGSM ≥ PGD in the images that they leave."""
    left = [s.share("noise"), s.share("fgsm"), s.share("pgd")]
    excess = max(left[1] - left[0], left[2] - left[1])
    words = f"a stronger attack leaves more: noise {left[0]:.0%}, FGSM {left[1]:.0%}, PGD {left[2]:.0%}"
    return s.verdict("order", excess, excess <= _TOLERANCE, words)


def views(s: Subject) -> Check:
    """Is the exact gradient at least as strong as what stands in for it, or ignores the defence?"""
    exact = s.share("pgd")
    stand_ins = (view for view in s.defence.attacked if view != s.defence.strongest_view)
    others = {view: s.share("pgd", view) for view in stand_ins}
    view, least = min(others.items(), key=lambda item: item[1], default=("", exact))
    words = f"PGD leaves {exact:.0%} through the exact gradient, {least:.0%} through {view}"
    return s.verdict("views", exact - least, exact - least <= _TOLERANCE, words)


def black_box(s: Subject) -> Check:
    """Does an attack without gradients break what PGD cannot?"""
    missed = s.robust(s.adversarial("pgd")) & ~s.robust(s.adversarial("square"))
    share = share_of(missed)
    words = f"{share:.0%} of the images are broken without gradients, and not by PGD"
    return s.verdict("black box", share, share < 2 * _TOLERANCE, words)


def path(s: Subject) -> Check:
    """Is an image adversarial on the way to where PGD ended, but not there?"""
    x_adv = s.adversarial("pgd")
    alive = s.robust(x_adv)
    broken = torch.zeros_like(alive)
    for t in torch.linspace(0.1, 0.9, 9).tolist():
        broken |= ~correct(s.logits(s.x + t * (x_adv - s.x)), s.y)
    share = share_of(alive & broken)
    words = f"{share:.0%} of the images are broken on the path to where PGD ended, not at its end"
    return s.verdict("path", share, share < _TOLERANCE, words)


def convergence(s: Subject) -> Check:
    """Does a longer attack still break images that are said to be robust?"""
    if s.left is None:
        alive = s.robust(s.adversarial("pgd"))
        x, y, share, most = s.x[alive], s.y[alive], share_of(alive), 3 * _TOLERANCE
        before = s.score(s.adversarial("pgd")[alive], y, s.seed + 1)
    else:
        (x, y, before), share, most = s.left, s.left_share, _FALL
    if s.defence.predict is not None and s.threat.norm not in _BALLS and len(x):
        # What fools it is refused, and held to be defended; `detector_aware` is of balls alone.
        words = "no attack under this threat knows by which rule images are refused: they count as defended"
        return s.verdict("convergence", share, False, words)
    refuses = isinstance(s.defence.strongest, RejectingClassifier) and s.threat.norm in _BALLS
    last = _LAST_REFUSED if refuses else _LAST[s.threat.norm]
    seed = s.seed + 1_500_000_001  # not a start that the attacks before had
    before = before.to(x)
    score, worst = before.clone(), x.clone()
    draws = s.seed + 2_000_003  # of those, none is among the draws that judge
    for config in last:
        at = (score > 0).nonzero()[:, 0]
        if len(at):
            view = s.defence.strongest_view if SPECS[config.name].gradient else NO_GRADIENT
            x_adv = attack_images(Job(s.defence, config, view, s.threat), x[at], y[at], seed, others=s.x)
            found = s.score(x_adv, y[at], draws)
            lower = found < score[at]
            score[at[lower]], worst[at[lower]] = found[lower], x_adv[lower]
    at = (score < before).nonzero()[:, 0]
    if s.defence.draws > 1:
        # Chosen by some draws, judged by others; where all images share those, by so much they may err.
        score[at] = s.score(worst[at], y[at], draws + 1)
        most += (share * (1 - share) / s.defence.draws) ** 0.5 * 2
    if s.keep is not None and len(worst):
        s.keep(worst)
    broken = max(int((before - score).sum().round()), 0)
    fall = share * float((before - score).sum() / before.sum().clamp(min=1))
    words = (
        f"{', '.join(config.label for config in last)} break another {broken} of {len(x)} images that "
        f"were left: the figure is some {100 * fall:.0f} points too high"
    )
    return s.verdict("convergence", fall, broken < 2 or fall <= most, words)


def budget(s: Subject) -> Check:
    """Does a larger radius help the defender?"""
    excess = s.share("pgd", None, 2.0) - s.share("pgd")
    words = f"PGD at twice the radius leaves {excess:.0%} of the images more"
    return s.verdict("budget", excess, excess <= _TOLERANCE, words)


def unbounded(s: Subject) -> Check:
    """Does an attack without bound break everything? Any image lies within L∞ 1 of any other."""
    free = Subject(s.defence, Threat("linf", 1.0), s.x, s.y, 2 * s.steps, s.seed)
    left = free.share("pgd")
    words = f"PGD without bound (L∞ 1) leaves {left:.0%} of the images"
    return s.verdict("unbounded", left, left < 2 * _TOLERANCE, words)


Checks = tuple[Callable[[Subject], Check], ...]
OF_MODEL: Checks = (
    gradient,
    slope,
    stability,
    probabilities,
    saturation,
    offset,
    randomness,
    batch,
    memory,
    recording,
    jump,
    edge,
    rule,
    unbounded,
)
OF_THREAT: Checks = (order, views, black_box, path, convergence, budget)
CHECKS: Checks = (*OF_MODEL, *OF_THREAT)


def examine(
    defence: Defence,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    *,
    left: tuple[Tensor, Tensor, Tensor] | None = None,
    left_share: float = 1.0,
    seed: int = 0,
    unused: Classifier | None = None,
    checks: Checks = CHECKS,
    keep: Callable[[Tensor], None] | None = None,
) -> list[Check]:
    """Checks of one defence on images (N, C, H, W) with labels (N,), some dozens.

    Those `OF_MODEL` look at its gradients and answers, whatever the threat, those `OF_THREAT` at what
    attacks find within it: passing them under one threat says nothing of another.

    `left` are images, labels and scores of those that an evaluation could not break, or some of them, and
    `left_share` the robust accuracy that it states; without, those are taken that PGD leaves.
    Where `threat` is no L∞ or L2 ball, L∞ 0.1 stands in for it, but for what is `left`: whether a longer
    attack breaks that is asked of every threat. `keep` is given what that attack makes of them,
    (M, C, H, W), the clean images where it broke none. `unused` is a copy of the deployed model from
    before it was asked anything; without, nobody looks whether it remembers, and one that is the model
    itself says that it could not be copied.
    Images that the defence gets wrong to begin with say nothing and are left out.
    """
    clean = Subject(defence, threat, x, y)
    # Asked twice: one that answers every other time is not to be left alone for a wrong answer.
    right = clean.right() | clean.right()
    if not right.any():
        return []
    x, y = x[right], y[right]
    own = Subject(
        defence, threat, x, y, seed=seed, left=left, left_share=left_share, unused=unused, keep=keep
    )
    subject = (
        own if threat.norm in EXAMINED else replace(own, threat=_STAND_IN, left=None, keep=None, _kept={})
    )
    found = []
    for check in checks:
        asked = own if check is convergence and left is not None else subject
        made = check(asked)
        if check in OF_THREAT:
            made = replace(made, norm=asked.threat.norm, eps=asked.threat.eps)
        found.append(made)
    return found
