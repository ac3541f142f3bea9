"""The attacks an evaluation can be given: what it must know of each, and how one is bound to a threat."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from manifold_defense import attacks
from manifold_defense.evaluation.defence import ORDER, ViewName
from manifold_defense.filter import DefendedClassifier
from manifold_defense.rejection import RejectingClassifier
from manifold_defense.types import Attack, Classifier, Norm, Threat

AttackName = Literal[
    "noise",
    "fgsm",
    "mi_fgsm",
    "pgd",
    "apgd",
    "window_pgd",
    "square_pgd",
    "transfer_pgd",
    "cw",
    "ddn",
    "fmn",
    "fab",
    "deepfool",
    "jsma",
    "pgd_l0",
    "stroke_search",
    "patch",
    "feature_matching",
    "range",
    "detector_aware",
    "square",
    "sparse_rs",
    "hop_skip_jump",
    "corruption",
]

_PRESSING: Mapping[str, Any] = {"stop_early": False}


class Spec(NamedTuple):
    """What the suite must know of an attack."""

    function: Callable[..., Tensor]
    norms: tuple[Norm, ...]
    steps: str | None = "steps"  # the parameter that `AttackConfig.steps` sets
    restarts: str | None = None  # and `AttackConfig.restarts`, and so on
    tries: str | None = None
    queries: str | None = None
    targets: str | None = None
    losses: tuple[str, ...] = ()  # that it takes, the default first
    gradient: bool = True
    random: bool = True  # another seed may find more
    cycle: int = 1  # after so many restarts it has begun in every way that it has
    others: str | None = None  # the parameter that takes images other than those attacked
    control: bool = False  # no attack, but what every attack must beat
    # What makes it press on after its own model is fooled, as it must to fool another one.
    pressing: Mapping[str, Any] = _PRESSING
    # More parameters, for attacks that know what stands behind a view, and the kinds of model that have it.
    knows: Callable[[Any], dict[str, Any]] | None = None
    kinds: tuple[type, ...] = (DefendedClassifier, RejectingClassifier)
    view: ViewName | None = None  # the only one that it differs in, if there is one


_Filtered = DefendedClassifier | RejectingClassifier


def _features(defended: _Filtered) -> dict[str, Any]:
    return {"features": defended.filter}


def _surrogate(defended: _Filtered) -> dict[str, Any]:
    return {"surrogate": defended.classifier}


def _residual(defended: RejectingClassifier) -> dict[str, Any]:
    return {"residual": defended.residual, "threshold": defended.threshold}


def _range(defended: _Filtered) -> dict[str, Any]:
    return {
        "generator": defended.filter.generator,
        "surrogate": defended.classifier,
        "start": lambda x: defended.filter.project(x).z,
    }


_PASSES = frozenset({"features", "surrogate", "residual"})


def seen_through(model: Classifier | None) -> Classifier | None:
    """What an attack can look into: of a model that draws, the one that is averaged."""
    return model.model if isinstance(model, attacks.Expectation) else model


def _range_attack(
    model: Classifier, x: Tensor, y: Tensor, *, start: Callable[[Tensor], Tensor], **rest: Any
) -> Tensor:
    """The range attack from where the filter itself takes the images."""
    return attacks.range_attack(model, x, y, z=start(x), **rest)


_BALLS: tuple[Norm, ...] = ("linf", "l2", "l1")
_BOTH: tuple[Norm, ...] = ("linf", "l2")
_LOSSES = ("ce", "margin", "dlr")
_TWO_LOSSES = ("ce", "margin", "both")
SPECS: dict[str, Spec] = {
    "noise": Spec(attacks.noise, _BOTH, "draws", gradient=False, control=True, pressing={}),
    "fgsm": Spec(attacks.fgsm, _BALLS, None, losses=_LOSSES, random=False, pressing={}),
    "mi_fgsm": Spec(attacks.mi_fgsm, _BOTH, losses=_LOSSES, random=False),
    "pgd": Spec(
        attacks.pgd, _BALLS, restarts="restarts", losses=(*_LOSSES, "both"), targets="target_classes"
    ),
    "apgd": Spec(attacks.apgd, _BALLS, restarts="restarts", losses=_LOSSES, targets="target_classes"),
    "window_pgd": Spec(
        attacks.window_pgd,
        _BALLS,
        restarts="restarts",
        tries="tries",
        losses=("both", "ce", "margin"),
        cycle=4,
        others="pieces",
    ),
    "square_pgd": Spec(
        attacks.square_pgd, _BOTH, restarts="restarts", queries="queries", losses=("both", "ce", "margin")
    ),
    "transfer_pgd": Spec(
        attacks.transfer_pgd,
        _BALLS,
        restarts="restarts",
        tries="tries",
        losses=("both", "ce", "margin"),
        knows=_surrogate,
        cycle=4,
        others="pieces",
    ),
    # An image at the boundary of its own model fools no other: ten logits past it.
    "cw": Spec(
        attacks.cw, ("l2",), restarts="searches", random=False, pressing={**_PRESSING, "confidence": 10.0}
    ),
    # The nearest image is what these are for: they cannot press on.
    "ddn": Spec(attacks.ddn, ("l2",), random=False, pressing={}),
    "fmn": Spec(attacks.fmn, (*_BALLS, "l0"), random=False, pressing={}),
    "deepfool": Spec(attacks.deepfool, _BOTH, random=False, pressing={}),
    "fab": Spec(attacks.fab, _BALLS, restarts="restarts", targets="target_classes", cycle=2, pressing={}),
    "jsma": Spec(attacks.jsma, ("l0",), None, random=False, pressing={}),
    "pgd_l0": Spec(attacks.pgd_l0, ("l0",), restarts="restarts", losses=_TWO_LOSSES),
    "stroke_search": Spec(
        attacks.stroke_search, ("l0",), restarts="restarts", tries="tries", queries="queries", others="pieces"
    ),
    "patch": Spec(attacks.patch, ("patch",), restarts="restarts", losses=_TWO_LOSSES),
    "feature_matching": Spec(
        attacks.feature_matching, _BOTH, restarts="restarts", others="candidates", knows=_features
    ),
    # Differentiates the classifier behind the generator, whatever the view.
    "range": Spec(_range_attack, _BALLS, restarts="restarts", cycle=2, knows=_range, view="exact"),
    "detector_aware": Spec(
        attacks.detector_aware,
        _BALLS,
        restarts="restarts",
        cycle=4,
        others="pieces",
        knows=_residual,
        kinds=(RejectingClassifier,),
    ),
    "square": Spec(attacks.square, _BOTH, restarts="restarts", gradient=False),
    "sparse_rs": Spec(attacks.sparse_rs, ("l0",), restarts="restarts", gradient=False),
    "hop_skip_jump": Spec(attacks.hop_skip_jump, _BOTH, "queries", "restarts", gradient=False),
    "corruption": Spec(attacks.corruption, ("corruption",), "draws", gradient=False),
}

_NUMBERS = ("steps", "restarts", "tries", "queries", "targets")  # fields of `AttackConfig` and of `Spec`


@dataclass(frozen=True)
class AttackConfig:
    """One attack of the suite and its strength.

    name       of the attack (docs/evaluation.md)
    steps      gradient passes; for noise and corruption the draws, for square, sparse_rs and
               hop_skip_jump the queries of the model (0: the attack's own number)
    restarts   of those that have some; for cw the searches on its constant (0: the attack's own number)
    loss       that is climbed: ce, margin, dlr, or both, which is ce and margin by turns, a restart
               each
    targets    of pgd, apgd and fab: how many of the most likely wrong classes are aimed at, each in a run of
               its own, whatever the loss (0: none, the attack is untargeted)
    tries      of window_pgd, transfer_pgd and stroke_search: what is drawn for each start, which is the best
               of it (0: the attack's own number)
    queries    of square_pgd and stroke_search: beside their gradients (0: the attack's own number)
    rounds     how often it may be tried, each time with other draws on the images that it left; it ends, and
               has settled, as soon as two in a row break none. A defence whose `draws` are more than one
               meets one round alone, since of many tries the lowest share of its draws would count; it has
               not settled then
    views      the gradients through which a filter is attacked (see `ManifoldFilter`); `unaware` attacks the
               bare classifier. None named: all that it has. Those that it lacks are passed over; if it
               has none of those named, all are used. A defence with a single view meets the attack once,
               as does every defence an attack without gradients
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    name: AttackName = "pgd"
    steps: int = 0
    restarts: int = 0
    loss: Literal["", "ce", "margin", "dlr", "both"] = ""
    targets: int = 0
    tries: int = 0
    queries: int = 0
    rounds: int = 1
    views: tuple[ViewName, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in SPECS:
            raise ValueError(f"name: expected one of {', '.join(SPECS)}, got {self.name!r}")
        spec = SPECS[self.name]
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}")
            if getattr(spec, name) is None and value:
                raise ValueError(f"{name} of {self.name}: expected none, it has none to set; got {value}")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds: expected a whole number of at least 1, got {self.rounds!r}")
        if self.rounds > 1 and not spec.random:
            raise ValueError(f"rounds of {self.name}: expected 1, it draws nothing; got {self.rounds}")
        if self.rounds > 1 and self._restarts < self._cycle:
            raise ValueError(
                f"rounds of {self.name}: expected 1 unless it has {self._cycle} restarts, which differ in "
                f"how they begin or what they climb; got {self.rounds} with {self._restarts}"
            )
        if self.loss and self.loss not in spec.losses:
            known = f"one of {', '.join(spec.losses)}" if spec.losses else "none"
            raise ValueError(f"loss of {self.name}: expected {known}, got {self.loss!r}")
        if not set(self.views) <= set(ORDER):
            raise ValueError(f"views: expected some of {', '.join(ORDER)}, got {list(self.views)}")

    @property
    def _restarts(self) -> int:
        """Its own number, if none is set."""
        spec = SPECS[self.name]
        known = inspect.signature(spec.function).parameters.get(spec.restarts or "")
        return self.restarts or (known.default if known else 1)

    @property
    def _cycle(self) -> int:
        spec = SPECS[self.name]
        climbed = self.loss or (spec.losses[0] if spec.losses else "")
        return max(spec.cycle, 2 if climbed == "both" else 1)

    @property
    def label(self) -> str:
        """How rows name this attack: `pgd`, `pgd-margin` for another loss, `apgd-t` with targets."""
        spec = SPECS[self.name]
        loss = f"-{self.loss}" if self.loss not in ("", "both", *spec.losses[:1]) else ""
        return f"{self.name}{loss}{'-t' if self.targets else ''}"

    def applies_to(self, threat: Threat) -> bool:
        return threat.norm in SPECS[self.name].norms

    def bind(
        self,
        threat: Threat,
        *,
        seed: int,
        press: bool,
        model: Classifier | None = None,
        counted: Callable[[Classifier], Classifier] | None = None,
        others: Tensor | None = None,
    ) -> Attack:
        """The attack within `threat`; with `press` it goes on after its own model is fooled.

        `model` is the attacked view, for attacks that look behind it; `counted` puts a counter before
        what they differentiate there; `others` (N, C, H, W) are images for those that borrow from some.
        """
        spec = SPECS[self.name]
        found: dict[str, Any] = {"norm": threat.norm, "eps": threat.eps, "seed": seed}
        for name in _NUMBERS:
            if getattr(self, name):
                found[getattr(spec, name)] = getattr(self, name)
        if self.loss:
            found["loss"] = self.loss
        if press:
            found |= spec.pressing
        if spec.others and others is not None:
            found[spec.others] = others
        behind = seen_through(model)
        if spec.knows and isinstance(behind, spec.kinds):
            found |= spec.knows(behind)
            if counted is not None:
                found |= {key: counted(found[key]) for key in _PASSES & found.keys()}
        return partial(spec.function, **found)
