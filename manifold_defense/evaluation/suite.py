"""Which attacks are run against which defence, and how one is bound to a threat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple, get_args

from manifold_defense.attacks import cw, fgsm, noise, pgd
from manifold_defense.filter import DefendedClassifier
from manifold_defense.types import Attack, Classifier, Threat

ViewName = Literal["unaware", "start", "identity", "tangent", "gauss_newton", "implicit", "exact"]


# How far past the boundary, in logits, a C&W image is pushed that is to fool another model.
_TRANSFER_MARGIN = 10.0


@dataclass(frozen=True)
class AttackConfig:
    """One attack of the suite and its strength.

    steps      of pgd and cw; for noise the number of draws
    restarts   of pgd; for cw the searches on its constant
    loss       that fgsm and pgd climb: ce, margin, or both (pgd: by turns, a restart each)
    views      in which a filter is attacked: through a gradient of its own (see `ManifoldFilter`;
               those that it does not have are passed over), or not at all (unaware: the bare
               classifier is attacked). A bare classifier has but its own gradient, and meets the
               attack once whatever stands here.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.config

    name: Literal["noise", "fgsm", "pgd", "cw"] = "pgd"
    steps: int = 40
    restarts: int = 1
    loss: Literal["ce", "margin", "both"] = "ce"
    views: tuple[ViewName, ...] = ("unaware", "identity", "exact")

    def __post_init__(self) -> None:
        if self.name not in ("noise", "fgsm", "pgd", "cw"):
            raise ValueError(f"name: expected noise, fgsm, pgd or cw, got {self.name!r}")
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        losses = {"pgd": ("ce", "margin", "both"), "fgsm": ("ce", "margin")}.get(self.name, ("ce",))
        if self.loss not in losses:
            raise ValueError(f"loss of {self.name}: expected one of {', '.join(losses)}, got {self.loss!r}")
        known = get_args(ViewName)
        if not self.views or not set(self.views) <= set(known):
            raise ValueError(f"views: expected some of {', '.join(known)}, got {list(self.views)}")

    @property
    def label(self) -> str:
        """How rows name this attack: `pgd`, or `pgd-margin` for the other loss."""
        return f"{self.name}-margin" if self.loss == "margin" else self.name

    def applies_to(self, threat: Threat) -> bool:
        return self.name != "cw" or threat.norm == "l2"

    def bind(self, threat: Threat, *, seed: int, transfer: bool) -> Attack:
        """The attack within `threat`; a `transfer` attack presses on after its own model is fooled."""
        norm, eps = threat.norm, threat.eps
        if self.name == "noise":
            return partial(noise, norm=norm, eps=eps, draws=self.steps, seed=seed)
        if self.name == "fgsm":
            return partial(fgsm, norm=norm, eps=eps, loss=self.loss)
        if self.name == "cw":
            bound = partial(cw, norm=norm, eps=eps, steps=self.steps, searches=self.restarts)
            return partial(bound, stop_early=False, confidence=_TRANSFER_MARGIN) if transfer else bound
        return partial(
            pgd,
            norm=norm,
            eps=eps,
            steps=self.steps,
            restarts=self.restarts,
            loss=self.loss,
            stop_early=not transfer,
            seed=seed,
        )


@dataclass(frozen=True)
class Defence:
    """A model whose predictions count, and the models that an attacker may differentiate instead."""

    name: str
    model: Classifier
    attacked: Mapping[str, Classifier]  # view -> model handed to the attack

    @classmethod
    def bare(cls, name: str, classifier: Classifier) -> Defence:
        """A classifier without a filter: its own gradient is the exact one."""
        return cls(name, classifier, {"exact": classifier})

    @classmethod
    def filtered(cls, name: str, defended: DefendedClassifier) -> Defence:
        """A classifier behind a filter, in every view."""
        views = [view for view in get_args(ViewName) if view in defended.filter.views()]
        return cls(
            name,
            defended,
            {"unaware": defended.classifier, **{view: defended.view(view) for view in views}},
        )


class Job(NamedTuple):
    """One cell of the evaluation: an attack on a defence in one view (no attack: clean images)."""

    defence: Defence
    attack: AttackConfig | None
    view: str | None
    threat: Threat | None

    @property
    def name(self) -> str:
        if self.attack is None or self.threat is None:
            return f"{self.defence.name} clean"
        return f"{self.defence.name} {self.attack.label} {self.view} {self.threat.norm} {self.threat.eps:g}"


def jobs(
    defences: Sequence[Defence], attacks: Sequence[AttackConfig], threats: Sequence[Threat]
) -> Iterator[Job]:
    """Every cell of the table, defence by defence, cheap views first."""
    for defence in defences:
        yield Job(defence, None, None, None)
        for threat in threats:
            for attack in attacks:
                if not attack.applies_to(threat):
                    continue
                # Noise asks for no gradient: one view says it all.
                wanted = ("exact",) if attack.name == "noise" or len(defence.attacked) == 1 else attack.views
                for view in defence.attacked:
                    if view in wanted:
                        yield Job(defence, attack, view, threat)
