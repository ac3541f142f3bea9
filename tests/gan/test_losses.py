"""Adversarial losses against closed forms: scores by hand, and penalties of linear and quadratic critics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gan.losses import LOSSES, R3GAN, WGAN_GP


def draw(seed: int, n: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 4, 4, generator=generator, dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


W = draw(9, 1) - 0.3
LINEAR = 3.0 * W


def linear_critic(x: Tensor) -> Tensor:
    return (LINEAR * x).flatten(1).sum(1) + 1


def quadratic_critic(x: Tensor) -> Tensor:
    """Its gradient at x is x."""
    return 0.5 * x.square().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("real", "fake", "critic", "generator"),
    [
        (0.0, 0.0, math.log(2), math.log(2)),
        (3.0, 3.0, math.log(2), math.log(2)),
        (1.0, 0.0, math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))),
        (-2.0, 0.5, math.log(1 + math.exp(2.5)), math.log(1 + math.exp(-2.5))),
        (50.0, -50.0, 0.0, 100.0),
    ],
)
def test_r3gan_pairs_scores(real: float, fake: float, critic: float, generator: float) -> None:
    """`softplus(D(G(z)) − D(x))`, and for the generator the other way round."""
    scores = torch.tensor([real]).double(), torch.tensor([fake]).double()
    torch.testing.assert_close(R3GAN.critic(*scores), torch.tensor([critic]).double())
    torch.testing.assert_close(R3GAN.generator(*scores), torch.tensor([generator]).double())


def test_wasserstein_scores() -> None:
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -3.0])
    assert WGAN_GP.critic(real, fake).tolist() == [4.0, -5.0]
    assert WGAN_GP.generator(real, fake).tolist() == [-5.0, 3.0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_two_players_pull_in_opposite_directions(name: str) -> None:
    loss = LOSSES[name]
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    critic_fake = torch.autograd.grad(loss.critic(real, fake).sum(), fake)[0]
    critic_real = torch.autograd.grad(loss.critic(real, fake).sum(), real)[0]
    generator_fake = torch.autograd.grad(loss.generator(real, fake).sum(), fake)[0]
    assert (critic_fake > 0).all()
    assert (critic_real < 0).all()
    assert (generator_fake < 0).all()
    assert loss.critic(real, fake).shape == loss.generator(real, fake).shape == (4,)


def test_the_zero_centred_penalty_of_a_linear_critic() -> None:
    """`½ (‖w‖² + ‖w‖²)`, wherever the images are."""
    found = R3GAN.penalty(linear_critic, draw(0), draw(1), rng())
    torch.testing.assert_close(found, LINEAR.square().sum().expand(5))


def test_the_zero_centred_penalty_of_a_quadratic_critic() -> None:
    real, fake = draw(0), 2 * draw(1)
    squares = real.square().flatten(1).sum(1) + fake.square().flatten(1).sum(1)
    torch.testing.assert_close(R3GAN.penalty(quadratic_critic, real, fake, rng()), squares / 2)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
def test_the_one_centred_penalty_of_a_linear_critic(scale: float) -> None:
    def critic(x: Tensor) -> Tensor:
        return scale * linear_critic(x) / LINEAR.norm()

    found = WGAN_GP.penalty(critic, draw(0), draw(1), rng())
    torch.testing.assert_close(found, torch.full((5,), (scale - 1) ** 2).double(), atol=1e-5, rtol=1e-6)


def test_the_one_centred_penalty_looks_between_real_and_fake() -> None:
    """On the quadratic critic `√penalty + 1` is the distance from the origin at which it looked."""
    ray = draw(2) / draw(2).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    real, fake = 2 * ray.expand(5, -1, -1, -1), 4 * ray.expand(5, -1, -1, -1)
    first = WGAN_GP.penalty(quadratic_critic, real, fake, rng(0)).sqrt() + 1
    assert ((first > 2) & (first < 4)).all()
    assert first.unique().numel() == 5  # another point for each image
    assert torch.equal(first, WGAN_GP.penalty(quadratic_critic, real, fake, rng(0)).sqrt() + 1)
    assert not torch.equal(first, WGAN_GP.penalty(quadratic_critic, real, fake, rng(1)).sqrt() + 1)


@pytest.mark.parametrize(("name", "slope"), [("r3gan", 2.0), ("wgan_gp", 2.0 * (1 - 1 / 0.25))])
def test_a_penalty_teaches_the_critic(name: str, slope: float) -> None:
    """Its gradient in the weights w: `2w`, or `2 (‖w‖ − 1) w / ‖w‖`; here `‖w‖ = ¼`."""
    w = (W / W.norm() / 4).requires_grad_(True)
    penalty = LOSSES[name].penalty(lambda x: (w * x).flatten(1).sum(1), draw(0), draw(1), rng())
    (gradient,) = torch.autograd.grad(penalty.mean(), w)
    torch.testing.assert_close(gradient, slope * w.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_penalty_is_an_images_own_and_leaves_no_trace(name: str) -> None:
    real, fake = draw(0), draw(1)
    penalty: Any = LOSSES[name].penalty
    together = penalty(quadratic_critic, real, fake, rng())
    assert together.shape == (5,)
    torch.testing.assert_close(penalty(quadratic_critic, real[:1], fake[:1], rng())[0], together[0])
    assert real.grad is None
    assert not real.requires_grad
    assert not fake.requires_grad
