"""What several rooms test with: digits to learn, a linear generator with a known answer, a CPU fabric."""

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gan import Encoder, Generator, NetworkConfig
from gan.optimisation import seeded

TINY = NetworkConfig(latent_dim=6, generator_width=4, critic_width=4, encoder_width=4, max_width=16)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors as small as these are computed faster by one thread, above all on busy cores."""
    torch.set_num_threads(1)


class LinearGenerator(nn.Module):
    """`G(z) = Az + b` (N, 1, 8, 8), around grey: the projection of x is `lstsq(A, x − b)`."""

    def __init__(self, latent_dim: int = 5) -> None:
        super().__init__()
        self.latent_dim, self.image_shape = latent_dim, (1, 8, 8)
        rng = torch.Generator().manual_seed(7)
        matrix = torch.randn(64, latent_dim, generator=rng, dtype=torch.float64) / 20
        self.matrix, self.offset = nn.Parameter(matrix), nn.Parameter(torch.full_like(matrix[:, 0], 0.5))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.matrix.T + self.offset).unflatten(1, self.image_shape)

    def solve(self, x: Tensor) -> Tensor:
        """The oracle (N, D), by numpy."""
        right = (x.flatten(1) - self.offset).detach().numpy()
        return torch.from_numpy(np.linalg.lstsq(self.matrix.detach().numpy(), right.T)[0].T)


@pytest.fixture
def linear() -> LinearGenerator:
    """In float64."""
    return LinearGenerator()


@pytest.fixture
def networks() -> tuple[Generator, Encoder]:
    """A small, curved, untrained generator of (1, 8, 8) images and an encoder, in float32."""
    generator = seeded(0, lambda: Generator((1, 8, 8), TINY))
    return generator, seeded(1, lambda: Encoder((1, 8, 8), TINY))


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """200 images (N, 1, 8, 8) of handwritten digits, and their labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[:200]).float().div(16).unflatten(1, (1, 8, 8))
    return x, torch.from_numpy(labels[:200])


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)
