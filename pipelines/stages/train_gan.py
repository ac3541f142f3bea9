"""Stage `train-gan`: generator, critic and joint encoder on the user's images."""

from __future__ import annotations

from typing import Any

import torch

from gan.training import gan_state, train_gan
from manifold_defense.artifact import save_gan
from pipelines.board import grid
from pipelines.context import Context


def run(context: Context) -> dict[str, Any]:
    config, fabric = context.config.gan, context.fabric
    state = gan_state(fabric, context.data.image_shape, config, context.config.seed)
    joint = config.reconstruction_weight > 0
    context.resume(state)

    generator, encoder = state["generator_average"], state["encoder_average"]
    x, _ = context.test_images(500)
    fixed = torch.randn(64, generator.latent_dim, generator=torch.Generator().manual_seed(0)).to(x)

    @torch.no_grad()
    def picture(images: int) -> None:
        context.board.add_image("samples", grid(generator(fixed)), images)
        if joint:
            reconstructions = generator(encoder(x[:32]))
            pairs = torch.stack([x[:32], reconstructions], 1).flatten(0, 1)
            context.board.add_image("test images and G(E(x))", grid(pairs, 16), images)
            error = (generator(encoder(x)) - x).square().mean()
            context.board.add_scalar("test_reconstruction_error", float(error), images)

    loop = train_gan(fabric, state, context.image_batches(config.batch_size), config, context.config.seed)
    context.train(loop, state, config.images, picture)
    if context.main:
        save_gan(generator, encoder if joint else None, context.folder)
    metrics = {"generator_parameters": sum(p.numel() for p in generator.parameters())}
    with torch.no_grad():
        error = float((generator(encoder(x)) - x).square().mean()) if joint else None
    return {**metrics, "encoder_error": error, "unreadable_images": len(context.data.unreadable)}
