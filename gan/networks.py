"""Generator, critic and encoder, sized by the image shape (8×8 to 64×64, grey or RGB).

Shapes: N images, D latent size, C channels, H×W pixels. The networks hold no normalisation layer
and no dropout, so an image's result never depends on its batch or on the module's mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

LEAK = 0.2


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the three networks.

    latent_dim       length of z
    generator_width  channels at full resolution, twice as many after each halving
    critic_width     likewise
    encoder_width    likewise
    max_width        channels at most
    blocks           residual blocks at every resolution of the generator
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    latent_dim: int = 32
    generator_width: int = 16
    critic_width: int = 16
    encoder_width: int = 32
    max_width: int = 256
    blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("latent_dim", "generator_width", "critic_width", "encoder_width", "max_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.blocks < 0:
            raise ValueError(f"blocks: expected at least 0, got {self.blocks}")


def halvings(height: int, width: int) -> int:
    """How often an image is halved: down to 4 pixels a side, or until a side is odd."""
    count = 0
    while min(height, width) >= 8 and height % 2 == 0 and width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count


def _channels(width: int, max_width: int, levels: int) -> list[int]:
    """Channels from full resolution (index 0) to the coarsest."""
    return [min(width * 2**level, max_width) for level in range(levels + 1)]


def _activation() -> nn.Module:
    """In place: what comes before it is not needed again, and memory is what these networks wait for."""
    return nn.LeakyReLU(LEAK, inplace=True)


def _initialise(module: nn.Module) -> None:
    """He initialisation for leaky ReLUs; biases start at zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):  # each output pixel sees kernel/stride² taps
                fan_in = layer.weight.shape[0] * layer.weight[0, 0].numel() // math.prod(layer.stride)
            gain = math.sqrt(2 / (1 + LEAK**2))
            nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ResidualBlock(nn.Module):
    """`x + conv(act(conv(act(x))))`, the last convolution starting at zero: (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.LeakyReLU(LEAK)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(self.act(self.conv1(self.act(x))))
        return out


class Generator(nn.Module):
    """Latents (N, D), standard normal a priori, to images (N, C, H, W) in [0, 1]."""

    def __init__(self, image_shape: tuple[int, int, int], config: NetworkConfig) -> None:
        super().__init__()
        channels, height, width = image_shape
        levels = halvings(height, width)
        sizes = _channels(config.generator_width, config.max_width, levels)
        self.image_shape = (channels, height, width)
        self.latent_dim = config.latent_dim
        self.config = config
        self._coarse = (sizes[-1], height >> levels, width >> levels)

        self.dense = nn.Linear(config.latent_dim, math.prod(self._coarse))
        layers: list[nn.Module] = [_activation()]
        for level in range(levels, 0, -1):
            layers += [ResidualBlock(sizes[level]) for _ in range(config.blocks)]
            layers += [nn.ConvTranspose2d(sizes[level], sizes[level - 1], 4, stride=2, padding=1)]
            layers += [_activation()]
        layers += [ResidualBlock(sizes[0]) for _ in range(config.blocks)]
        layers += [nn.Conv2d(sizes[0], channels, 3, padding=1), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)
        _initialise(self)
        _zero_residuals(self)
        # The order in which few channels are convolved fastest; images come out in it as well.
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(self.dense(z).unflatten(1, self._coarse))
        return out


class _Downward(nn.Module):
    """Images (N, C, H, W) in [0, 1] to `outputs` numbers each, by strided convolutions."""

    def __init__(self, image_shape: tuple[int, int, int], width: int, max_width: int, outputs: int) -> None:
        super().__init__()
        channels, height, image_width = image_shape
        levels = halvings(height, image_width)
        sizes = _channels(width, max_width, levels)
        layers: list[nn.Module] = [nn.Conv2d(channels, sizes[0], 3, padding=1), _activation()]
        for level in range(levels):
            layers += [nn.Conv2d(sizes[level], sizes[level + 1], 4, stride=2, padding=1), _activation()]
        flat = sizes[-1] * (height >> levels) * (image_width >> levels)
        hidden = 2 * sizes[-1]
        layers += [nn.Flatten(), nn.Linear(flat, hidden), _activation(), nn.Linear(hidden, outputs)]
        self.layers = nn.Sequential(*layers)
        _initialise(self)
        self.to(memory_format=torch.channels_last)  # faster forward and backward, as above

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(2 * x - 1)
        return out


class Critic(_Downward):
    """Images (N, C, H, W) to one realness score each, (N,)."""

    def __init__(self, image_shape: tuple[int, int, int], config: NetworkConfig) -> None:
        super().__init__(image_shape, config.critic_width, config.max_width, outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)


class Encoder(_Downward):
    """Images (N, C, H, W) to latents (N, D): an amortised inverse of the generator."""

    def __init__(self, image_shape: tuple[int, int, int], config: NetworkConfig) -> None:
        super().__init__(image_shape, config.encoder_width, config.max_width, outputs=config.latent_dim)
        self.image_shape = image_shape
        self.config = config


@torch.no_grad()
def _zero_residuals(module: nn.Module) -> None:
    """Let every residual block start as the identity."""
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            block.conv2.weight.zero_()
