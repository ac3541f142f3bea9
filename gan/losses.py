"""Adversarial losses: each pairs a critic loss, a generator loss and a gradient penalty.

N images; scores are (N,). Penalties differentiate the critic twice: never compile it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Critic = Callable[[Tensor], Tensor]


class AdversarialLoss(NamedTuple):
    """`critic(real_scores, fake_scores)` and `generator(real_scores, fake_scores)` are (N,) losses;
    `penalty(critic, real, fake, rng)` is a (N,) penalty, to be weighted by the caller."""

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    penalty: Callable[[Critic, Tensor, Tensor, torch.Generator], Tensor]


def _squared_gradient_norm(critic: Critic, x: Tensor) -> Tensor:
    """`‖∇_x D(x)‖²` of each image, (N,), differentiable in the critic's parameters."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def _zero_centred_penalty(critic: Critic, real: Tensor, fake: Tensor, rng: torch.Generator) -> Tensor:
    """`½ (‖∇D(x)‖² + ‖∇D(G(z))‖²)`: R1 and R2 (Huang et al. 2024, eq. 2 and 3)."""
    return 0.5 * (_squared_gradient_norm(critic, real) + _squared_gradient_norm(critic, fake))


def _one_centred_penalty(critic: Critic, real: Tensor, fake: Tensor, rng: torch.Generator) -> Tensor:
    """`(‖∇D(x̂)‖ − 1)²` at random points between real and fake (Gulrajani et al. 2017, eq. 3)."""
    mix = torch.rand(len(real), generator=rng).to(real).view(-1, 1, 1, 1)
    between = mix * real + (1 - mix) * fake
    return (torch.sqrt(_squared_gradient_norm(critic, between) + 1e-12) - 1).square()


# Relativistic pairing: each fake is compared with a real one, so no mode can be dropped for free
# (R3GAN, Huang et al. 2024).
R3GAN = AdversarialLoss(
    critic=lambda real, fake: F.softplus(fake - real),
    generator=lambda real, fake: F.softplus(real - fake),
    penalty=_zero_centred_penalty,
)

# Wasserstein distance with a gradient penalty (Gulrajani et al. 2017).
WGAN_GP = AdversarialLoss(
    critic=lambda real, fake: fake - real,
    generator=lambda real, fake: -fake,
    penalty=_one_centred_penalty,
)

LOSSES = {"r3gan": R3GAN, "wgan_gp": WGAN_GP}
