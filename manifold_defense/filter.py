"""The projection as a preprocessing filter, and a classifier behind it.

Both are ordinary modules with an honest gradient: whoever differentiates them gets that of the
deployed computation unless another view is asked for by name. A view changes the backward pass
alone, never the result.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from manifold_defense.projection import ProjectionConfig, check_images, project, project_exactly
from manifold_defense.types import Projection, View

VIEWS: tuple[View, ...] = ("exact", "identity")


class ManifoldFilter(nn.Module):
    """Replace images by their projection onto a generator's range.

    `generator` and `encoder` are modules that fit the protocols of `manifold_defense.types`; they
    are frozen and kept in eval mode. The filter follows `.to(device)` like any module.

    Views: `exact` differentiates through every solver step, `identity` takes ∂G(z*)/∂x for the
    identity (BPDA, Athalye, Carlini & Wagner 2018).

    Does not defend against perturbations along the manifold, nor repair what the classifier gets
    wrong on it; images that the generator cannot draw are damaged.
    """

    def __init__(
        self,
        generator: nn.Module,
        encoder: nn.Module | None = None,
        config: ProjectionConfig | None = None,
        view: View = "exact",
    ) -> None:
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"view: expected one of {', '.join(VIEWS)}, got {view!r}")
        self.generator = generator
        self.encoder = encoder
        self.config = config or ProjectionConfig(start="encoder" if encoder is not None else "prior")
        if self.config.start == "encoder" and encoder is None:
            raise ValueError("start 'encoder' needs an encoder; pass one, or a config with start='prior'")
        self.view = view
        self.requires_grad_(False)
        self.eval()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the filter takes."""
        c, h, w = self.generator.image_shape  # type: ignore[misc]
        return int(c), int(h), int(w)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a filter has nothing to train, and batch statistics would couple images."""
        return super().train(False)

    def project(self, x: Tensor) -> Projection:
        """The whole result for images (N, C, H, W): latents, images, errors and steps; no gradient."""
        return project(self.generator, x, self.config, encoder=self.encoder)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """G(z*) for one image (C, H, W) or a batch (N, C, H, W), float in [0, 1], shaped as the input."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.project(x).image
        if self.view == "identity":
            check_images(x, self.image_shape)
            return self.project(x).image + (x - x.detach())
        return project_exactly(self.generator, x, self.config, encoder=self.encoder)  # type: ignore[arg-type]


class DefendedClassifier(nn.Module):
    """`classifier(filter(x))`: images (N, C, H, W) in [0, 1] to logits (N, K).

    `view(name)` gives the same model with another gradient, which is all that an attack sees.
    """

    def __init__(self, filter: ManifoldFilter, classifier: nn.Module) -> None:
        super().__init__()
        self.filter = filter
        self.classifier = classifier

    def view(self, name: View) -> DefendedClassifier:
        """This model, sharing all weights, differentiated as `name` says."""
        inner = self.filter
        return DefendedClassifier(
            ManifoldFilter(inner.generator, inner.encoder, inner.config, name), self.classifier
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.filter(x))
        return logits
