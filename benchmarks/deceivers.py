"""Models that look more robust than they are, by accident or by intent; each has the labels of an honest one.

`model` is any classifier of images (N, C, H, W) that returns logits (N, K). What each of them hides is in its
docstring; the evaluator must say that their figures are none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _labels(logits: Tensor) -> Tensor:
    return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)


class Lukewarm(nn.Module):
    """The less confident the farther an image lies from those that it knows.

    Its gradient is true, and leads cross-entropy and the margin away from every boundary of labels.
    """

    def __init__(self, model: nn.Module, known: Tensor, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate
        self.register_buffer("known", known.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        squares = torch.cdist(x.flatten(1), self.get_buffer("known")).square()
        nearest = -0.05 * (-squares / 0.05).logsumexp(1)
        logits: Tensor = self.model(x) * (-self.rate * nearest).exp().unsqueeze(1)
        return logits


class Labels(nn.Module):
    """The labels of the first `classes` classes on another surface, whose smooth gradient is of no use."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        rng = torch.Generator().manual_seed(0)
        slopes = torch.randn(x.shape[1:].numel(), logits.shape[1], generator=rng).to(x)
        surface = 20 * _labels(logits) + 0.1 * x.flatten(1) @ slopes
        return torch.where((logits.argmax(1) < self.classes).unsqueeze(1), surface, logits)


class OnGrid(nn.Module):
    """Itself on images as they are stored, in `levels` + 1 greys; off that grid its answers hardly move."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> Tensor:
        steps = self.levels * x
        stored = (steps - steps.round()).abs().flatten(1).amax(1) < 1e-3
        logits: Tensor = self.model(x)
        return torch.where(stored.unsqueeze(1), logits, _labels(logits) + 0.01 * logits)


class Alone(nn.Module):
    """Itself if asked one image at a time, and otherwise a surface on which only labels are its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits if len(x) == 1 else 20 * _labels(logits) + x.mean((1, 2, 3)).unsqueeze(1)


class Remembers(nn.Module):
    """Answers what lies within L∞ 0.2 of the first images that it was asked as it answered those."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        with torch.no_grad():
            if self.first is None:
                self.first = x.detach().clone()
            distance, nearest = torch.cdist(x.detach().flatten(1), self.first.flatten(1), p=torch.inf).min(1)
            sure = 30 * _labels(self.model(self.first))[nearest] * (distance <= 0.2).unsqueeze(1)
        return logits + sure


class Alternates(nn.Module):
    """Itself whenever it is asked, but for every `period`th time, when its logits are negated."""

    def __init__(self, model: nn.Module, period: int = 2, asked: int = 0) -> None:
        super().__init__()
        self.model, self.period, self.asked = model, period, asked

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        logits: Tensor = self.model(x)
        return logits if self.asked % self.period else -logits


class Neighbour(nn.Module):
    """The label of the nearest image that it knows, on a surface of no use."""

    def __init__(self, known: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("known", known.flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor) -> Tensor:
        known, labels = self.get_buffer("known"), self.get_buffer("labels")
        label = labels[torch.cdist(x.detach().flatten(1), known).argmin(1)]
        rng = torch.Generator().manual_seed(0)
        classes = int(labels.max()) + 1
        slopes = torch.randn(x.shape[1:].numel(), classes, generator=rng).to(x)
        surface: Tensor = 20 * F.one_hot(label, classes) + 0.1 * x.flatten(1) @ slopes
        return surface
