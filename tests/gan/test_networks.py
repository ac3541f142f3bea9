"""The networks: shapes for every image size, outputs in [0, 1], no coupling, weights by seed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan import Critic, Encoder, Generator, NetworkConfig
from gan.averaging import averaged_copy, update_average
from gan.networks import ResidualBlock, halvings
from gan.optimisation import cosine, seeded

SMALL = NetworkConfig(latent_dim=7, generator_width=4, critic_width=4, encoder_width=4, max_width=16)
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 20, 20), (2, 8, 16), (1, 9, 11)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def images(shape: tuple[int, int, int], n: int = 4) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def latents(n: int = 4, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, 7, generator=torch.Generator().manual_seed(0))


@shapes
@pytest.mark.parametrize("blocks", [0, 1])
def test_a_generator_draws_images_of_its_shape(shape: tuple[int, int, int], blocks: int) -> None:
    config = NetworkConfig(7, 4, 4, 4, 16, blocks)
    generator = seeded(0, lambda: Generator(shape, config))
    assert (generator.latent_dim, generator.image_shape, generator.config) == (7, shape, config)
    for scale in (0.0, 1.0, 1e4):
        drawn = generator(latents(scale=scale))
        assert drawn.shape == (4, *shape)
        assert drawn.dtype == torch.float32
        assert (drawn >= 0).all()
        assert (drawn <= 1).all()
    assert generator(latents()).std() > 1e-3
    assert generator(latents(0)).shape == (0, *shape)


@shapes
def test_critic_and_encoder_read_images_of_their_shape(shape: tuple[int, int, int]) -> None:
    critic = seeded(0, lambda: Critic(shape, SMALL))
    encoder = seeded(0, lambda: Encoder(shape, SMALL))
    assert critic(images(shape)).shape == (4,)
    assert encoder(images(shape)).shape == (4, 7)
    assert (encoder.image_shape, encoder.config) == (shape, SMALL)
    assert critic(images(shape, 0)).shape == (0,)
    assert encoder(images(shape, 0)).shape == (0, 7)
    with pytest.raises(RuntimeError):
        critic(images((shape[0] + 1, *shape[1:])))


def couples(module: nn.Module, x: Tensor) -> bool:
    """Whether an output depends on the rest of the batch, or on the module's mode."""
    together = module.train()(x)
    alone = torch.cat([module(x[i : i + 1]) for i in range(len(x))])
    evaluated = module.eval()(x)
    close = [torch.allclose(other, together, atol=1e-5) for other in (alone, evaluated)]
    return not all(close)


@shapes
def test_no_image_depends_on_its_batch_or_on_a_mode(shape: tuple[int, int, int]) -> None:
    assert not couples(seeded(0, lambda: Generator(shape, SMALL)), latents())
    assert not couples(seeded(0, lambda: Critic(shape, SMALL)), images(shape))
    assert not couples(seeded(0, lambda: Encoder(shape, SMALL)), images(shape))


def test_coupling_would_be_noticed() -> None:
    assert couples(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.BatchNorm2d(2)), images((1, 8, 8))
    )
    assert couples(nn.Dropout(), images((1, 8, 8)))


@pytest.mark.parametrize("network", [Generator, Critic, Encoder])
def test_weights_are_a_function_of_the_seed(network: Any) -> None:
    before = torch.get_rng_state()

    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in seeded(seed, lambda: network((1, 8, 8), SMALL)).parameters()])

    first = weights(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("size", "count"), [((8, 8), 1), ((28, 28), 2), ((32, 32), 3), ((64, 64), 4), ((20, 20), 2), ((9, 9), 0)]
)
def test_images_are_halved_down_to_four_pixels_or_an_odd_side(size: tuple[int, int], count: int) -> None:
    assert halvings(*size) == count


def test_widths_are_as_configured() -> None:
    generator = Generator((3, 32, 32), NetworkConfig(7, generator_width=4, max_width=16))
    widths = [layer.in_channels for layer in generator.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert widths == [16, 16, 8]
    assert [
        layer.out_channels
        for layer in Critic((3, 32, 32), NetworkConfig(critic_width=5, max_width=12)).modules()
        if isinstance(layer, nn.Conv2d)
    ] == [5, 10, 12, 12]


def test_a_residual_block_starts_as_the_identity_and_learns() -> None:
    config = NetworkConfig(7, 4, blocks=2)
    generator = seeded(0, lambda: Generator((1, 8, 8), config))
    blocks = [module for module in generator.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 4
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(block(x), x)
        (gradient,) = torch.autograd.grad(block(x).square().sum(), block.conv2.weight)
        assert gradient.abs().max() > 0


def test_activations_keep_their_scale_at_the_start() -> None:
    """He initialisation: neither saturated nor dead after four halvings."""
    generator = seeded(0, lambda: Generator((3, 64, 64), NetworkConfig(16)))
    z = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    logits = generator.layers[:-1](generator.dense(z).unflatten(1, generator._coarse))
    assert 0.3 < logits.std() < 3


@pytest.mark.parametrize(
    "key", ["latent_dim", "generator_width", "critic_width", "encoder_width", "max_width", "blocks"]
)
def test_a_config_names_its_bad_key(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected at least"):
        NetworkConfig(**{key: -1})


# --- Averages and rates ---


def test_an_average_moves_by_its_half_life() -> None:
    module = nn.BatchNorm1d(3)
    average = averaged_copy(module)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(7.0)
    update_average(average, module, batch=100, images=10_000, half_life=100)
    torch.testing.assert_close(average.weight, torch.full((3,), 2.0))  # half the way from 1 to 3
    torch.testing.assert_close(average.running_mean, torch.full((3,), 3.5))  # batch statistics with them
    update_average(average, module, batch=100, images=10_000, half_life=50)
    torch.testing.assert_close(average.weight, torch.full((3,), 2.75))  # three quarters of the rest
    # Early on, a tenth of the images seen: nearly all is forgotten.
    update_average(average, module, batch=100, images=100, half_life=1e9)
    torch.testing.assert_close(average.weight, torch.full((3,), 3 - 0.25 * 2**-10))
    assert torch.equal(module.weight, torch.full((3,), 3.0))


def test_the_rate_falls_along_a_half_cosine() -> None:
    assert cosine(0.1, 0, 100) == pytest.approx(0.1)
    assert cosine(0.1, 50, 100) == pytest.approx(0.1 * (0.05 + 0.95 / 2))
    assert cosine(0.1, 100, 100) == pytest.approx(0.005)
    assert cosine(0.1, 1000, 100) == pytest.approx(0.005)
    rates = [cosine(0.1, images, 100) for images in range(101)]
    assert rates == sorted(rates, reverse=True)
