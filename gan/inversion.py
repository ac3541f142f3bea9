"""Fit the encoder to a frozen generator: the amortised start of every projection.

N images, D latent size; x images (N, C, H, W) in [0, 1], δ a perturbation of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gan.averaging import averaged_copy, update_average
from gan.networks import Encoder, Generator
from gan.optimisation import Batches, Record, State, cosine, descend
from gan.sampling import step_rng

# Images (N, C, H, W) to the same with a change in one place each, at random.
Change = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class EncoderConfig:
    """Training of the encoder; `images` counts real images seen (0: it stays as it is).

    The loss is `‖G(E(x + δ)) − x‖²` on data plus `latent_weight · ‖E(G(z)) − z‖²` on samples.

    perturbation  none: δ = 0; noise: δ drawn in the ball; adversarial: from there up the
                  reconstruction error, `min_E max_δ ‖G(E(x + δ)) − x‖²`
    attack_steps  gradients that it climbs: one, in the manner of Wong, Rice & Kolter (2020), or more,
                  as PGD does (Madry et al. 2018)
    norm, eps     the ball: linf, l2, or both by turns, with a radius for each
    windows       at L2 the climb begins at the worst of so many windows, rectangles turned bright or dark,
    pieces        and of so many pieces of other images of the batch, as far as the ball lets them, where
                  the attack `window_pgd` begins; of none: from δ drawn in the ball
    ramp          share of the training over which the radius grows from 0
    clean_share   weight of the loss at δ = 0 beside the perturbed one
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.config

    images: int = 50_000
    batch_size: int = 64
    lr: float = 1e-3
    latent_weight: float = 0.02
    average_half_life: int = 5_000
    perturbation: Literal["none", "noise", "adversarial"] = "adversarial"
    attack_steps: int = 4
    norm: Literal["linf", "l2", "both"] = "both"
    eps_linf: float = 0.15
    eps_l2: float = 1.0
    windows: int = 0
    pieces: int = 0
    ramp: float = 0.5
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("perturbation", ("none", "noise", "adversarial")),
            ("norm", ("linf", "l2", "both")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("eps_linf", "eps_l2"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected above 0 and finite, got {getattr(self, name)}")
        for name in ("ramp", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected in [0, 1], got {getattr(self, name)}")
        for name, least in (
            ("images", 0),
            ("batch_size", 1),
            ("average_half_life", 1),
            ("attack_steps", 1),
            ("windows", 0),
            ("pieces", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("windows", "pieces"):
            if getattr(self, name) and (self.perturbation != "adversarial" or self.norm == "linf"):
                raise ValueError(
                    f"{name}: expected 0, for only an adversarial perturbation at l2, or at both, "
                    f"begins there; got {getattr(self, name)}"
                )
        if self.pieces and self.batch_size < 2:
            raise ValueError(f"pieces: expected 0 in a batch of one image, got {self.pieces}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected above 0, got {self.lr}")
        if not self.latent_weight >= 0:
            raise ValueError(f"latent_weight: expected at least 0, got {self.latent_weight}")


def encoder_state(fabric: Fabric, encoder: Encoder, config: EncoderConfig) -> State:
    """Training starts from `encoder` (the joint one, or fresh)."""
    encoder = encoder.to(fabric.device)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=config.lr, betas=(0.9, 0.99))
    return {
        "encoder": encoder,
        "encoder_average": averaged_copy(encoder),
        "optimizer": fabric.setup_optimizers(optimizer),
        "step": 0,
        "images": 0,
    }


def train_encoder(
    fabric: Fabric,
    state: State,
    generator: Generator,
    batches: Batches,
    config: EncoderConfig,
    seed: int,
    *,
    changes: Sequence[Change] = (),
) -> Iterator[Record]:
    """Train `state["encoder"]` in place until `config.images` have been seen, yielding after every step.

    `changes` draw what `config.windows` and `config.pieces` ask for, each of them one try.
    """
    wanted = config.windows + config.pieces
    if len(changes) != wanted:
        raise ValueError(f"changes: expected {wanted}, as many as windows and pieces; got {len(changes)}")
    encoder: nn.Module = state["encoder"]
    generator.requires_grad_(False)
    while state["images"] < config.images:
        rng = step_rng(seed, state["step"], fabric.global_rank)
        real = batches(state["step"])
        disturbed = real
        if config.perturbation != "none":
            radius = min(1.0, state["images"] / (config.ramp * config.images)) if config.ramp else 1.0
            disturbed = _perturbed(encoder, generator, real, config, radius, state["step"], rng, changes)
        with fabric.autocast():
            reconstruction = (generator(encoder(disturbed)) - real).square().flatten(1)
            if config.perturbation != "none" and config.clean_share > 0:
                clean = (generator(encoder(real)) - real).square().flatten(1)
                reconstruction = (1 - config.clean_share) * reconstruction + config.clean_share * clean
            z = torch.randn(len(real), generator.latent_dim, generator=rng).to(real)
            inversion = (encoder(generator(z)) - z).square().sum(1).mean()
            loss = reconstruction.sum(1).mean() + config.latent_weight * inversion
        descend(fabric, state["optimizer"], loss, cosine(config.lr, state["images"], config.images))

        batch = config.batch_size * fabric.world_size
        state["step"] += 1
        state["images"] += batch
        update_average(state["encoder_average"], encoder, batch, state["images"], config.average_half_life)
        yield Record(
            state["images"],
            {"reconstruction_error": reconstruction.detach().mean(), "latent_error": inversion.detach()},
        )


def _perturbed(
    encoder: nn.Module,
    generator: Generator,
    x: Tensor,
    config: EncoderConfig,
    radius: float,
    step: int,
    rng: torch.Generator,
    changes: Sequence[Change] = (),
) -> Tensor:
    """`x + δ` in [0, 1] with δ in the ball of `config`, shrunk to the share `radius` of its size."""
    norm = config.norm if config.norm != "both" else ("linf", "l2")[step % 2]
    eps = radius * (config.eps_linf if norm == "linf" else config.eps_l2)

    def errors(at: Tensor) -> Tensor:
        error: Tensor = (generator(encoder(at)) - x).square().flatten(1).sum(1)
        return error

    in_place = norm == "l2" and len(changes) > 0
    if norm == "linf":
        delta = eps * (2 * torch.rand(x.shape, generator=rng).to(x) - 1)
    elif in_place:
        delta = _worst_change(errors, x, eps, changes, rng)
    else:
        delta = (
            eps
            * torch.rand(len(x), 1, 1, 1, generator=rng).to(x)
            * _unit(torch.randn(x.shape, generator=rng).to(x))
        )
    if config.perturbation == "adversarial":
        # The lengths cross the ball, from wherever δ began; a change in one place lies at its edge, and high.
        across = 1.5 if in_place else 2.5
        length = eps * (1.25 if config.attack_steps == 1 else across / config.attack_steps)
        for _ in range(config.attack_steps):
            at = (x + delta).clamp(0, 1).requires_grad_(True)
            (gradient,) = torch.autograd.grad(errors(at).sum(), at)
            if norm == "linf":
                delta = (delta + length * gradient.sign()).clamp(-eps, eps)
            else:
                delta = _shortened(delta + length * _unit(gradient), eps)
    return (x + delta).clamp(0, 1)


@torch.no_grad()
def _worst_change(
    errors: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    changes: Sequence[Change],
    rng: torch.Generator,
) -> Tensor:
    """Of one δ (N, C, H, W) of each of `changes`, no longer than eps, each image's of the highest error."""
    best, highest = torch.zeros_like(x), x.new_full((len(x),), -torch.inf)
    for draw in changes:
        delta = _shortened(draw(x, rng) - x, eps)
        error = errors(x + delta)
        higher = error > highest
        best = torch.where(higher.view(-1, 1, 1, 1), delta, best)
        highest = torch.where(higher, error, highest)
    return best


def _shortened(delta: Tensor, eps: float) -> Tensor:
    return delta * (eps / _size(delta)).clamp(max=1.0)


def _size(delta: Tensor) -> Tensor:
    """`‖δ‖₂`, (N, 1, 1, 1), never zero."""
    size: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return size.clamp(min=1e-12)


def _unit(delta: Tensor) -> Tensor:
    return delta / _size(delta)
