"""Which attacks are run against which defence in which view, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from manifold_defense.evaluation.defence import NO_GRADIENT, Defence
from manifold_defense.evaluation.recipe import SPECS, AttackConfig, seen_through
from manifold_defense.types import Threat


class Job(NamedTuple):
    """One cell of the evaluation: an attack on a defence in one view (no attack: clean images, or checks)."""

    defence: Defence
    attack: AttackConfig | None
    view: str | None
    threat: Threat | None
    # Of a transfer: the defence whose adversarial images are tried. If that is this one, those of smaller
    # threats of the same norm.
    source: str | None = None

    @property
    def label(self) -> str:
        if self.source == self.defence.name:
            return "smaller threat"
        if self.source is not None:
            return f"transfer from {self.source}"
        return self.attack.label if self.attack else self.view or "clean"

    @property
    def name(self) -> str:
        if self.threat is None:
            return f"{self.defence.name} clean"
        return f"{self.defence.name} {self.label} {self.view} {self.threat.norm} {self.threat.eps:g}"

    def seed(self, seed: int, turn: int, batch: int) -> int:
        """One of its own for every attack, view, threat, round and batch: no two jobs draw the same.

        It is the same for all defences, whose figures then are of equal draws.
        """
        facts = f"{seed} {self.label} {self.view} {self.threat} {turn} {batch}"
        return int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7])

    @property
    def rounds(self) -> int:
        return self.attack.rounds if self.attack and self.defence.draws == 1 else 1


def jobs(
    defences: Sequence[Defence], attacks: Sequence[AttackConfig], threats: Sequence[Threat]
) -> Iterator[Job]:
    """Every cell of the table but the transfers: by defence and threat, then from ignorant views to
    the exact one, then without gradients; noise comes first.
    """
    for defence in defences:
        yield Job(defence, None, None, None)
        for threat in threats:
            meeting = [(attack, SPECS[attack.name]) for attack in attacks if attack.applies_to(threat)]
            for attack, spec in meeting:
                if spec.control:
                    yield Job(defence, attack, NO_GRADIENT, threat)
            for view in defence.attacked:
                for attack, spec in meeting:
                    if spec.gradient and _meets(attack, defence, view):
                        yield Job(defence, attack, view, threat)
            for attack, spec in meeting:
                if not spec.gradient and not spec.control:
                    yield Job(defence, attack, NO_GRADIENT, threat)


def _meets(attack: AttackConfig, defence: Defence, view: str) -> bool:
    spec = SPECS[attack.name]
    if spec.knows and not isinstance(seen_through(defence.attacked[view]), spec.kinds):
        return False
    if spec.view is not None:
        return view == spec.view
    if len(defence.attacked) == 1 or not attack.views:
        return True
    # Stand-ins are attacked no less than exact gradients are, lest what has none seem the stronger.
    wanted: set[str] = set(attack.views)
    knowing = set(defence.attacked) - {"unaware"}
    if wanted - {"unaware"} and not wanted & knowing:
        wanted |= knowing
    return view in wanted
