"""Classifiers sized by image shape, their normalisation the first layer, so budgets are in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ArchitectureConfig:
    """What a classifier is made of.

    name   cnn: three convolutions, the last two strided, and a hidden layer of 128; shallow: two, 5 × 5, the
           second strided, and that hidden layer: shorter, hence tighter to bound; resnet18: torchvision's
    width  channels are in proportion to it, but for resnet18
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by pipelines.settings

    name: Literal["cnn", "shallow", "resnet18"] = "cnn"
    width: int = 32

    def __post_init__(self) -> None:
        if self.name not in _BUILDERS:
            raise ValueError(f"name: expected one of {', '.join(_BUILDERS)}, got {self.name!r}")
        if self.width < 1:
            raise ValueError(f"width: expected at least 1, got {self.width}")


class ImageClassifier(nn.Module):
    """Images (N, C, H, W) in [0, 1] to logits (N, K); `features` gives what the last layer sees."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        config: ArchitectureConfig,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        """`mean` and `std` are per channel, (C,), of the training images."""
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.classes, self.config = classes, config
        mean = torch.full((channels,), 0.5) if mean is None else mean
        std = torch.full((channels,), 0.5) if std is None else std
        self.register_buffer("mean", mean.detach().float().view(1, -1, 1, 1).clone())
        self.register_buffer("std", std.detach().float().view(1, -1, 1, 1).clone())
        self.body, self.head = _BUILDERS[config.name](self.image_shape, classes, config.width)
        # Faster on a CPU, up to twice at width 32.
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, F)."""
        out: Tensor = self.body((x - self.mean) / self.std)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def _cnn(image_shape: tuple[int, int, int], classes: int, width: int) -> tuple[nn.Module, nn.Linear]:
    channels, height, image_width = image_shape
    body = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (image_width // 4), 128),
        nn.ReLU(),
    )
    return body, nn.Linear(128, classes)


def _shallow(image_shape: tuple[int, int, int], classes: int, width: int) -> tuple[nn.Module, nn.Linear]:
    channels, height, image_width = image_shape
    body = nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * ((height + 1) // 2) * ((image_width + 1) // 2), 128),
        nn.ReLU(),
    )
    return body, nn.Linear(128, classes)


def _resnet18(image_shape: tuple[int, int, int], classes: int, width: int) -> tuple[nn.Module, nn.Linear]:
    """torchvision's ResNet-18 with the stem of small images: a 3×3 convolution, no pooling."""
    from torchvision.models import resnet18

    body = resnet18(num_classes=classes)
    body.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
    body.maxpool = nn.Identity()
    head = body.fc
    body.fc = nn.Identity()
    return body, head


_BUILDERS = {"cnn": _cnn, "shallow": _shallow, "resnet18": _resnet18}
