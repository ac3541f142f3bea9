"""A filter that starts somewhere else at every call, and how its draws are repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from manifold_defense.filter import ManifoldFilter
from manifold_defense.projection import ProjectionConfig
from manifold_defense.types import Classifier, Projection, View


class RandomisedFilter(ManifoldFilter):
    """A filter with fresh prior starts for every call; within a call all images share them.

    The draws come from a stream of its own that begins at `seed`: two filters of one seed give the same
    results in the same order. `reseed` begins anew. Takes the place of a filter anywhere; all its views
    and other settings share the stream.

    Does not defend against an attacker who averages over the draws (`attacks.eot`); a figure is the
    mean over draws that the attacker has not seen.
    """

    def __init__(self, filter: ManifoldFilter, seed: int = 0) -> None:
        parts = (filter.generator, filter.encoder, filter.config, filter.view)
        super().__init__(*parts, trained=filter.trained)
        self._made = filter._made
        self.seed = seed
        self.rng = torch.Generator().manual_seed(seed)

    def _set(self, config: ProjectionConfig, view: View) -> None:
        if config.uses_bank or (config.uses_encoder and config.restarts == 1):
            raise ValueError(
                "a randomised filter needs prior starts: start='prior' or 'origin', or 'encoder' with "
                f"restarts > 1 and others='prior', got {config.start!r}, {config.restarts} restarts"
            )
        super()._set(config, view)

    def reseed(self, seed: int) -> None:
        """Begin the draws anew, at `seed`."""
        self.rng.manual_seed(seed)

    def draw(self) -> ManifoldFilter:
        """The next draw, as a filter that keeps it."""
        fresh = int(torch.randint(2**31, (), generator=self.rng))
        drawn = ManifoldFilter(self.generator, self.encoder, replace(self.config, seed=fresh), self.view)
        drawn._made = self._made
        return drawn

    def project(self, x: Tensor) -> Projection:
        return self.draw().project(x)

    def drawing(self, x: Tensor) -> Tensor:
        """G(z*) from the next draw's starts; see `ManifoldFilter`."""
        return self.draw().drawing(x)


@contextmanager
def seeded(model: Classifier, seed: int) -> Iterator[None]:
    """For a while, let every stream `rng` of a module in `model` begin at `seed`; then go on as before.

    The global generator, for models that draw from it, is seeded and given back likewise.
    """
    owners = model.modules() if isinstance(model, nn.Module) else ()
    found = [getattr(module, "rng", None) for module in owners]
    streams = [stream for stream in found if isinstance(stream, torch.Generator)]
    states = [stream.get_state() for stream in streams]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            for stream in streams:
                stream.manual_seed(seed)
            yield
        finally:
            for stream, state in zip(streams, states, strict=True):
                stream.set_state(state)
