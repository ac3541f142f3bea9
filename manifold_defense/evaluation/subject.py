"""A defence under examination for masked gradients, and what a check says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from manifold_defense.attacks import fgsm, noise, pgd, square
from manifold_defense.attacks.objective import correct, logits_and_gradient
from manifold_defense.evaluation.defence import Defence
from manifold_defense.evaluation.outcome import judge
from manifold_defense.modes import evaluation_mode
from manifold_defense.types import Classifier, Threat


@dataclass(frozen=True)
class Check:
    """What one check found: `figure` is what `words` speak of, the verdict is `passed`.

    `norm` and `eps` are of the threat under which it was found; None where it is of the model itself.
    """

    defence: str
    name: str
    figure: float
    passed: bool
    words: str
    norm: str | None = None
    eps: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        under = f" at {self.norm} {self.eps:g}" if self.norm else ""
        return f"{self.defence}{under}: {self.words}"


@dataclass
class Subject:
    """A defence under examination: images (N, C, H, W), labels (N,), a threat.

    `left` are images (M, C, H, W), labels (M,) and scores (M,) of what other attacks could not break, a
    sample of the share `left_share` of all; without, those are taken that `adversarial` leaves. `unused`
    is a copy of the deployed model that was never asked anything. Results of attacks are kept, since
    several checks compare the same ones; `keep` is given what the last of them made of what was left.
    """

    defence: Defence
    threat: Threat
    x: Tensor
    y: Tensor
    steps: int = 15
    seed: int = 0
    left: tuple[Tensor, Tensor, Tensor] | None = None
    left_share: float = 1.0
    unused: Classifier | None = None
    keep: Callable[[Tensor], None] | None = None
    _kept: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def adversarial(self, attack: str = "pgd", view: str | None = None, scale: float = 1.0) -> Tensor:
        """Images after noise, fgsm, square or pgd (two restarts, both losses), at `scale` times eps."""
        view = self.defence.strongest_view if view is None else view
        key = (attack, view, scale)
        if key not in self._kept:
            norm, eps = self.threat.norm, self.threat.eps * scale
            eps = min(eps, 1.0) if norm == "linf" else eps  # images differ by no more
            model = self.defence.attacked[view]
            if attack == "noise":
                made = noise(self.defence.answering, self.x, self.y, norm=norm, eps=eps, seed=self.seed)
            elif attack == "square":
                made = square(
                    self.defence.answering, self.x, self.y, norm=norm, eps=eps, steps=200, seed=self.seed
                )
            elif attack == "fgsm":
                made = fgsm(model, self.x, self.y, norm=norm, eps=eps, loss="margin")
            else:
                made = pgd(
                    model,
                    self.x,
                    self.y,
                    norm=norm,
                    eps=eps,
                    steps=self.steps,
                    restarts=2,
                    loss="both",
                    stop_early=not self.defence.presses(view),
                    seed=self.seed,
                )
            self._kept[key] = made
        return self._kept[key]

    def robust(self, x_adv: Tensor) -> Tensor:
        """Which images (N,) have the right largest logit, clean and as `x_adv`."""
        return correct(self.logits(self.x), self.y) & correct(self.logits(x_adv), self.y)

    def right(self) -> Tensor:
        """Which images (N,) the deployed model gets right as they are, this time."""
        predicted = self.predicted(self.x)
        return correct(self.logits(self.x), self.y) if predicted is None else predicted == self.y

    def score(self, x_adv: Tensor, y: Tensor, seed: int) -> Tensor:
        """In which share (N,) of its draws the deployed model gets attacked images right, or refuses them."""
        if len(x_adv) == 0:
            return x_adv.new_zeros(0)
        return judge(self.defence, x_adv, y, attacked=True, seed=seed)[1].to(x_adv)

    def share(self, *attack: Any) -> float:
        """Of the images that are robust to `adversarial(*attack)`."""
        return share_of(self.robust(self.adversarial(*attack)))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """(N, K) of the deployed model in eval mode; of one that draws, of the mean that is attacked."""
        with evaluation_mode(self.defence.answering):
            return self.defence.asked(self.defence.answering, x)

    @torch.no_grad()
    def predicted(self, x: Tensor) -> Tensor | None:
        """Labels (N,) of a deployed model that has its own rule for them, in eval mode; -1: refused."""
        if self.defence.predict is None:
            return None
        with evaluation_mode(self.defence.model):
            return self.defence.predict(x)

    def gradient(self, x: Tensor) -> Tensor:
        """Of the margin at x (N, C, H, W); zero where the model hides it."""
        with evaluation_mode(self.defence.strongest):
            return logits_and_gradient(self.defence.strongest, x, self.y, "margin", targeted=False)[1]

    def verdict(self, name: str, figure: float, passed: bool, words: str) -> Check:
        return Check(self.defence.name, name, figure, passed, words)


def change_of(a: Tensor, b: Tensor) -> float:
    """The largest difference of logits (N, K) of the same images, by their `lead`; a million for NaN."""
    return min(float((a - b).abs().nan_to_num(torch.inf).amax() / lead(a)), 1e6) if len(a) else 0.0


def share_of(images: Tensor) -> float:
    """How many of (N,) are, in double precision, in which 3 of 30 are a tenth."""
    return int(images.sum()) / max(len(images), 1)


def lead(logits: Tensor) -> Tensor:
    """By how much the largest logit leads the second, the median over images of (N, K), ().

    What decides labels, and is no larger for a class that a constant has switched off.
    """
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return (first - second).median().clamp(min=1e-6)
