"""What an attack costs: images passed through the model, or a part of it, and generator evaluations."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from manifold_defense.attacks import Expectation
from manifold_defense.evaluation.defence import Defence
from manifold_defense.filter import ManifoldFilter
from manifold_defense.types import Classifier

COSTS = ("forward", "backward", "generator")


class Meter:
    """Counts while it is entered; `counted(model)` is the model with a counter before it."""

    def __init__(self, defence: Defence) -> None:
        self.forward = self.backward = self.generator = 0.0
        self.defence = defence
        filter = getattr(defence.model, "filter", None)
        self._generators = [filter.generator] if isinstance(filter, ManifoldFilter) else []
        self._hooks: list[Any] = []

    @property
    def counts(self) -> tuple[float, float, float]:
        """In the order of `COSTS`."""
        return self.forward, self.backward, self.generator

    def counted(self, model: Classifier) -> Classifier:
        return _Counted(model, self)

    def __enter__(self) -> Meter:
        self._hooks = [generator.register_forward_hook(self._drawn) for generator in self._generators]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _drawn(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.generator += len(output)


class _Counted(nn.Module):
    """The model itself, but for the counting; a callable that is no module is one all the same."""

    def __init__(self, model: Classifier, meter: Meter) -> None:
        super().__init__()
        self.model, self.meter = model, meter
        self.draws = model.draws if isinstance(model, Expectation) else 1

    def forward(self, x: Tensor) -> Tensor:
        self.meter.forward += len(x) * self.draws
        if x.requires_grad:
            x = x.view_as(x)  # a leaf may be shared: its hook would stay
            x.register_hook(self._passed)
        return self.meter.defence.asked(self.model, x)

    def _passed(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # as a function of the model's own can have it, which hides the true one
            self.meter.backward += len(gradient) * self.draws
