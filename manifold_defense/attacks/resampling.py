"""Images moved, turned, warped and blurred: (N, C, H, W) to the same shape, differentiable in them.

Computed in the images' own type, with maps made in float64; lengths are in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def translate(x: Tensor, down: int, right: int) -> Tensor:
    """Images (..., H, W) moved by whole pixels; the border's value fills what comes into view."""
    h, w = x.shape[-2:]
    rows = (torch.arange(h, device=x.device) - down).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) - right).clamp(0, w - 1)
    return x[..., rows, :][..., columns]


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) turned counter-clockwise about their centre, between pixels bilinear."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre = torch.tensor([x.shape[-2] - 1, x.shape[-1] - 1], dtype=torch.float64).view(2, 1, 1) / 2
    # Where a pixel comes from: the inverse turn. Rows count downwards.
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    return warp(x, torch.einsum("ij,jhw->ihw", turn, pixel_places(x) - centre) + centre)


def pixel_places(x: Tensor) -> Tensor:
    """Row and column of every pixel, (2, H, W), float64."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in x.shape[-2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def warp(x: Tensor, places: Tensor) -> Tensor:
    """Images (N, C, H, W) read at rows and columns `places` (2, H, W), bilinear, the border repeated."""
    sizes = torch.tensor(x.shape[-2:], dtype=torch.float64).view(2, 1, 1)
    # grid_sample counts columns first and puts −1 and 1 at the outer edges of the outer pixels.
    grid = ((2 * places + 1) / sizes - 1).flip(0).permute(1, 2, 0).to(x)
    return F.grid_sample(
        x, grid.expand(len(x), *grid.shape), mode="bilinear", padding_mode="border", align_corners=False
    ).clamp(0, 1)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Images (..., H, W) under a Gaussian of `sigma` pixels; the border mirrors, so the mean stays."""
    if not sigma > 0:
        raise ValueError(f"sigma: expected above 0, got {sigma}")
    return _blur_matrix(x.shape[-2], sigma).to(x) @ x @ _blur_matrix(x.shape[-1], sigma).to(x).mT


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """(n, n): row i holds what each pixel gives to pixel i; rows and columns sum to 1."""
    offsets = torch.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    weights = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    places = (torch.arange(n).unsqueeze(1) + offsets) % (2 * n)
    mirrored = torch.where(places < n, places, 2 * n - 1 - places)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(
        1, mirrored, (weights / weights.sum()).expand(n, -1)
    )
