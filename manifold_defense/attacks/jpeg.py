"""What JPEG does to an image, without the file: 8×8 DCT, quantisation, and back (ITU-T T.81).

The Huffman code that follows loses nothing and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Luminance quantisation table of JPEG at quality 50 (ITU-T T.81, table K.1).
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def compress(x: Tensor, quality: float, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as they come back from baseline JPEG at a quality of 1 to 100.

    They may leave [0, 1] a little, as decoders' do before they clip. `rounding` is applied to the
    quantised coefficients, and may be given a gradient: `torch.round` has none, `straight_through`
    that of the identity. Every channel is coded by itself as luminance, without the usual change of
    colour space; pixels are not rounded to 8 bits; sides that are no multiple of 8 are filled up with
    their last row and column.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    n, c, h, w = x.shape
    dct, table = _dct_matrix().to(x), _table(quality).to(x)
    rows, columns = (
        torch.arange(math.ceil(size / 8) * 8, device=x.device).clamp(max=size - 1) for size in (h, w)
    )
    padded = 255 * x[..., rows, :][..., columns] - 128
    blocks = padded.view(n, c, len(rows) // 8, 8, len(columns) // 8, 8).transpose(3, 4)
    coefficients = table * rounding(dct @ blocks @ dct.T / table)
    decoded = (dct.T @ coefficients @ dct).transpose(3, 4).reshape(padded.shape)
    return (decoded[..., :h, :w] + 128) / 255


def straight_through(v: Tensor) -> Tensor:
    """`round(v)`, with the gradient of v."""
    return torch.round(v).detach() + (v - v.detach())


def _dct_matrix() -> Tensor:
    """The orthonormal DCT-II of 8 samples, (8, 8): T.81 A.3.3 is `D B Dᵀ`."""
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(k.unsqueeze(1) * (2 * k + 1) * torch.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _table(quality: float) -> Tensor:
    """The quantisation table (8, 8), scaled as the Independent JPEG Group does."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(_LUMINANCE, dtype=torch.float64) * scale + 50) / 100).floor().clamp(1, 255)
