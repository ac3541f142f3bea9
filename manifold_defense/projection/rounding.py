"""A generator in bfloat16, on devices with instructions for it."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_defense.types import Generator


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes in bfloat16 itself, not by way of float32, which would be slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()  # of x86, then of ARM
    return device.type == "cpu" and any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Rounded:
    """`generator` with its layers in bfloat16: latents and images keep their type, not their digits.

    Of a float64 generator autocast changes nothing.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.latent_dim, self.image_shape = generator.latent_dim, generator.image_shape

    def __call__(self, z: Tensor, /) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16):
            return self.generator(z).to(z.dtype)
