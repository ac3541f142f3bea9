"""An evaluation under way: jobs meet images, and what breaks one defence is tried on the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from manifold_defense.evaluation.checks import Checks, examine
from manifold_defense.evaluation.defence import CHECKED, Defence
from manifold_defense.evaluation.ledger import Ledger, Mode
from manifold_defense.evaluation.outcome import Compute, Outcome, held, in_rounds, judged, run_job
from manifold_defense.evaluation.plan import Job
from manifold_defense.evaluation.subject import Check
from manifold_defense.types import Classifier, Threat

# Images that attacks borrow from: each batch of `feature_matching` draws them all.
_LENDERS = 1000


def spread(images: Tensor, count: int) -> Tensor:
    """At most `count` of the indices (M,), evenly over them: the images may be sorted by class."""
    if len(images) <= count:
        return images
    return images[torch.arange(count) * len(images) // count]


class Store(Protocol):
    """Where finished jobs are kept, so that an interrupted evaluation goes on."""

    def get(self, job: Job, met: Tensor) -> Outcome | None: ...

    def put(self, job: Job, outcome: Outcome) -> None: ...


class Course:
    """What has been run on images (N, C, H, W) with labels (N,), and what came of it.

    `outcomes` are in the order in which the jobs were run, `ledger` says what is left after them. Whenever a
    job is done `on_done` is told how many are.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        mode: Mode,
        seed: int,
        compute: Compute,
        store: Store | None,
        on_done: Callable[[int], None],
    ) -> None:
        self.ledger, self.outcomes = Ledger(mode), list[tuple[Job, Outcome]]()
        self._x, self._y, self._seed = x, y, seed
        self._compute, self._store, self._on_done = compute, store, on_done
        self._tried: dict[str, set[int]] = {}  # by the name of a transfer, images

    def attack(self, job: Job) -> None:
        """Let an attack, or no attack, meet the images that are left to it."""
        lenders = self._x[spread(torch.arange(len(self._x)), _LENDERS)]

        def work(at: Tensor, seed: int) -> Outcome:
            return run_job(job, self._x[at], self._y[at], seed, lenders)

        self._meet(job, self.ledger.left(job) if job.threat else torch.arange(len(self._x)), work)

    def transfer(self, pairs: Sequence[Job]) -> None:
        """Let transfers meet what broke their sources, until that breaks nothing more."""
        while waiting := [(job, pool) for job in pairs if (pool := self._untried(job)) is not None]:
            for job, pool in waiting:
                self._tried.setdefault(job.name, set()).update(pool)
                self._hand_on(job, pool)

    def examine(
        self, defence: Defence, threat: Threat, checks: Checks, unused: Classifier, size: int
    ) -> list[Check]:
        """What checks say of `size` images that are right, and of as many that are left.

        What they break is broken. `unused` is a copy of the model that has been asked nothing yet.
        """
        clean = self.ledger.clean[defence.name]
        score = self.ledger.worst.get((defence.name, threat), clean).clone()
        # Of a model that draws, the images that it gets right in most of its draws.
        right, at = (spread((of > 0.5).nonzero()[:, 0], size) for of in (clean, score))
        found = examine(
            defence,
            threat,
            self._x[right],
            self._y[right],
            left=(self._x[at], self._y[at], score[at]),
            left_share=float(score.mean()),
            seed=self._seed,
            unused=unused,
            checks=checks,
            keep=partial(self._break, Job(defence, None, CHECKED, threat), at),
        )
        if len(right) and not found:
            words = f"of {len(right)} images that it got right it gets none right when asked again"
            return [Check(defence.name, "randomness", 1.0, False, words)]
        return found

    def _meet(self, job: Job, met: Tensor, work: Callable[[Tensor, int], Outcome]) -> None:
        """Let a job meet the images `met` (M,), unless the store knows what comes of it."""

        def once(met: Tensor, turn: int) -> Outcome:
            def part(batch: int, images: slice) -> tuple[Tensor, ...]:
                return tuple(work(met[images], job.seed(self._seed, turn, batch)))

            if not len(met):
                return Outcome.empty(self._x)
            return Outcome(*self._compute(part, len(met)))._replace(met=met)

        outcome = self._store.get(job, met) if self._store is not None else None
        if outcome is None:
            outcome = in_rounds(job.rounds, met, once)
            if self._store is not None:
                self._store.put(job, outcome)
        self._enter(job, outcome)
        self._on_done(len(self.outcomes))

    def _untried(self, job: Job) -> dict[int, Tensor] | None:
        """What broke the source of a transfer: at first all of it, then what may still break more, if any."""
        pool, known = self.ledger.pool(job), self._tried.get(job.name)
        if known is None:
            return pool
        return {i: pool[i] for i in self.ledger.standing(job) if i in pool and i not in known} or None

    def _hand_on(self, job: Job, pool: Mapping[int, Tensor]) -> None:
        """Let the target of a transfer meet adversarial images, by index."""

        def work(at: Tensor, seed: int) -> Outcome:
            x_adv = torch.stack([pool[i] for i in at.tolist()]).to(self._x)
            return judged(job, self._x[at], self._y[at], x_adv, seed)

        self._meet(job, torch.tensor(list(pool), dtype=torch.long), work)

    def _break(self, job: Job, at: Tensor, x_adv: Tensor) -> None:
        """Enter what a check found on the images `at`."""
        x_adv = held(job, self._x[at], x_adv)
        self._enter(job, judged(job, self._x[at], self._y[at], x_adv, self._seed)._replace(met=at))

    def _enter(self, job: Job, outcome: Outcome) -> None:
        self.ledger.enter(job, outcome)
        self.outcomes.append((job, outcome))
