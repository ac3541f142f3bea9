"""The projection as a preprocessing filter, and a classifier behind it.

Both are ordinary modules with an honest gradient: whoever differentiates them gets that of the
deployed computation unless another view is asked for by name. A view changes the backward pass
alone, never the result.
"""

from __future__ import annotations

import copy
from typing import Any, Self, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from manifold_defense.modes import as_deployed, uncompiled, writes
from manifold_defense.projection import (
    PRESETS,
    Bank,
    Metric,
    ProjectionConfig,
    attach_gradient,
    check_images,
    project,
    project_exactly,
    project_softly,
    surroundings,
)
from manifold_defense.types import Generator, Projection, Threat, View

VIEWS: tuple[View, ...] = get_args(View)
_Model = TypeVar("_Model", bound=nn.Module)


class ManifoldFilter(nn.Module):
    """Replace images by their projection onto a generator's range, or move them towards it.

    `generator` and `encoder` are modules that fit the protocols of `manifold_defense.types`; they
    are frozen and kept in eval mode. `config` None is the preset `robust`, as in every recipe; without an
    encoder it is descent from prior starts. The filter follows `.to(device)` like any module.

    Views: `exact` differentiates through every solver step. `implicit` and `gauss_newton` use the
    optimality of z*, `tangent` the range's tangent space (see `attach_gradient`). `soft` takes the
    gradient of a mixture of all restarts in place of the best (see `project_softly`), `start` that of
    G(E(x)) alone, `identity` that of the identity; these are BPDA (Athalye, Carlini & Wagner 2018).

    `trained` says which threats its encoder met in training; it changes nothing but what is said of it.

    Does not defend against perturbations along the manifold, nor repair what the classifier gets
    wrong on it; images that the generator cannot draw are damaged.
    """

    def __init__(
        self,
        generator: nn.Module,
        encoder: nn.Module | None = None,
        config: ProjectionConfig | None = None,
        view: View = "exact",
        *,
        trained: tuple[Threat, ...] = (),
    ) -> None:
        super().__init__()
        self.generator = generator
        self.encoder = encoder
        self.trained = trained
        if config is None:
            config = PRESETS["robust"] if encoder is not None else ProjectionConfig(start="prior")
        for name in ("latent_dim", "image_shape"):
            if not hasattr(generator, name):
                raise TypeError(f"generator: expected latent_dim and image_shape, it has no {name}")
        self._set(config, view)
        # For each device, type and setting: of which weights, and what. Shared with all views of it.
        self._made: dict[object, tuple[object, tuple[Bank | None, Metric | None]]] = {}
        self.requires_grad_(False)
        self.eval()

    def _set(self, config: ProjectionConfig, view: View) -> None:
        """Take settings and view; ValueError if they do not fit the filter, or each other."""
        if not isinstance(config, ProjectionConfig):
            raise TypeError(
                f"config: expected a ProjectionConfig, such as PRESETS['accurate'], got {config!r}"
            )
        if view not in VIEWS:
            raise ValueError(f"view: expected one of {', '.join(VIEWS)}, got {view!r}")
        if config.uses_encoder and self.encoder is None:
            raise ValueError("start 'encoder' needs an encoder; pass one, or a config with start='prior'")
        if view == "start" and not config.uses_encoder:
            raise ValueError(f"view 'start' needs start='encoder', got start={config.start!r}")
        self.config, self.view = config, view

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the filter takes."""
        c, h, w = self._range.image_shape
        return int(c), int(h), int(w)

    @property
    def _range(self) -> Generator:
        return cast(Generator, self.generator)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a filter has nothing to train, and batch statistics would couple images."""
        return super().train(False)

    def configured(self, config: ProjectionConfig) -> Self:
        """This filter, sharing all weights, with other settings: `filter.configured(PRESETS["accurate"])`."""
        return self._like(config, self.view)

    def seen(self, view: View) -> Self:
        """This filter, sharing all weights, differentiated as `view` says."""
        return self._like(self.config, view)

    def _like(self, config: ProjectionConfig, view: View) -> Self:
        """Of its own kind, with the hooks that it has: what else it does, its views do."""
        other = with_parts(self)
        other._made = self._made
        other._set(config, view)
        return other

    def views(self) -> tuple[View, ...]:
        """The views that this filter has: all, without `start` if it starts from no encoder, or `soft`
        if no restarts compete.

        Of an encoder alone the exact gradient is the start's, and nothing is left to approximate.
        """
        return self.config.views

    @uncompiled
    def project(self, x: Tensor) -> Projection:
        """The whole result for images (N, C, H, W): latents, images, errors and steps; no gradient."""
        self._check(x)
        return project(self._range, x, self.config, **self._aids(x))

    def forward(self, x: Tensor) -> Tensor:
        """x + strength (G(z*) − x), for one image (C, H, W) or a batch (N, C, H, W), float in [0, 1]."""
        if isinstance(x, Tensor) and x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return self.blend(x, self.drawing(x))

    def blend(self, x: Tensor, drawing: Tensor) -> Tensor:
        """What the filter gives for images (N, C, H, W) with these drawings G(z*) of them."""
        strength = self.config.strength
        return drawing if strength == 1 else x + strength * (drawing - x)

    @uncompiled
    def drawing(self, x: Tensor) -> Tensor:
        """G(z*) for images (N, C, H, W), differentiable as the view says."""
        self._check(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.project(x).image
        if self.view == "exact":
            return project_exactly(self._range, x, self.config, **self._aids(x))
        found = self.project(x)
        if self.view == "identity":
            return found.image + (x - x.detach())
        if self.view == "start":
            assert self.encoder is not None
            with as_deployed(self.generator, self.encoder):
                surrogate = self.generator(self.encoder(x))
            imitation: Tensor = found.image + (surrogate - surrogate.detach())
            return imitation
        if self.view == "soft":
            mixture = project_softly(self._range, x, self.config, **self._aids(x))
            return found.image + (mixture - mixture.detach())
        metric = self._aids(x)["metric"]
        return attach_gradient(self._range, x, found.z, self.config, self.view, metric=metric)

    def _check(self, x: Tensor) -> None:
        """`check_images`, that they are of the type of the weights, and that no derivative would be lost."""
        check_images(x, self.image_shape)
        if is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "images: a filter is differentiated by torch.autograd in reverse mode alone; forward mode "
                "and the transforms of torch.func would lose its derivative"
            )
        weights = next(self.parameters(), x)
        if x.dtype != weights.dtype:
            raise ValueError(f"images: expected {weights.dtype} as the filter's weights are, got {x.dtype}")

    def _aids(self, x: Tensor) -> dict[str, Any]:
        """Encoder, bank and metric; the latter two are made anew once the generator's weights have changed.

        What is written to the `data` of a weight leaves no trace, and is not seen.
        """
        c = self.config
        key = (x.device, x.dtype, c.uses_metric and c.metric, c.uses_bank and (c.bank, c.seed))
        tensors = (*self.generator.parameters(), *self.generator.buffers())
        weights = [(id(tensor), writes(tensor)) for tensor in tensors]
        # One of `DataParallel` has no parameters to know its weights by.
        kept = {} if getattr(self.generator, "_is_replica", False) else self._made
        if key not in kept or kept[key][0] != weights:
            self._draws_what_it_says(x)
            kept[key] = weights, surroundings(self._range, x.detach()[:0], c)
        bank, metric = kept[key][1]
        return {"encoder": self.encoder, "bank": bank, "metric": metric}

    @torch.no_grad()
    def _draws_what_it_says(self, x: Tensor) -> None:
        """Raise ValueError for a generator that draws images of another shape than its own."""
        with as_deployed(self.generator):
            drawn = self._range(x.new_zeros(1, self._range.latent_dim))
        if drawn.shape != (1, *self.image_shape):
            raise ValueError(
                f"generator: expected images of shape {(1, *self.image_shape)}, as its image_shape says, got "
                f"{tuple(drawn.shape)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the weights, which is soon made anew."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_made": {}}


def with_parts(module: _Model, **parts: nn.Module) -> _Model:
    """A copy of a module, of its own kind, that shares everything but the submodules `parts`."""
    other = copy.copy(module)
    other._modules = {**module._modules, **parts}
    # It has the hooks that there are; those that either gets later are its own.
    vars(other).update({name: copy.copy(held) for name, held in vars(other).items() if "_hooks" in name})
    return other


class DefendedClassifier(nn.Module):
    """`classifier(filter(x))`: images (N, C, H, W) in [0, 1] to logits (N, K).

    With a `share` s below 1 the classifier is asked of the image and of its drawing, and what it says of
    the drawing counts for so much: `log((1 − s) softmax f(x) + s softmax f(filter(x)))`. For a classifier
    that was hardened and so is worth asking: inside its ball it loses less by the filter then, and
    outside it gains less. Raises ValueError for a share that is not in (0, 1], TypeError for what is no
    filter and no classifier. The filter is always in eval mode, the classifier in its own: `.eval()` it.

    `view(name)` gives the same model with another gradient, which is all that an attack sees.
    """

    def __init__(self, filter: ManifoldFilter, classifier: nn.Module, share: float = 1.0) -> None:
        super().__init__()
        if not isinstance(filter, ManifoldFilter) or isinstance(classifier, ManifoldFilter):
            given = f"{type(filter).__name__} and {type(classifier).__name__}"
            raise TypeError(
                f"expected DefendedClassifier(filter, classifier) of a ManifoldFilter, got {given}; wrap or "
                "compile the whole"
            )
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"share: expected a number in (0, 1], got {share!r}")
        self.filter = filter
        self.classifier = classifier
        self.share = share

    def view(self, name: View) -> Self:
        """This model, sharing all weights, differentiated as `name` says."""
        return with_parts(self, filter=self.filter.seen(name))

    def forward(self, x: Tensor) -> Tensor:
        drawn: Tensor = self.classifier(self.filter(x))
        if self.share == 1:
            return drawn
        return both_answers(self.classifier(x), drawn, self.share)


def both_answers(image: Tensor, drawing: Tensor, share: float) -> Tensor:
    """`log((1 − share) softmax(image) + share softmax(drawing))` of logits (N, K) and (N, K)."""
    answers = torch.stack([image, drawing], -1).log_softmax(-2)  # (N, K, 2)
    return (answers + answers.new_tensor([1 - share, share]).log()).logsumexp(-1)
