"""Settings that were measured, by name; docs/results/projection.md has their figures."""

from __future__ import annotations

from manifold_defense.projection.config import ProjectionConfig

# Defense-GAN as published and coded: 200 momentum steps of rate 10, then 1, from each of 10 starts
# N(0, I/D); the least final error wins (Samangouei, Kabkab, Chellappa, ICLR 2018). The yardstick.
REFERENCE = ProjectionConfig(
    solver="gd",
    metric="none",
    start="origin",
    restarts=10,
    steps=200,
    step_size=10.0,
    momentum=0.7,
    iterate="last",
)

# Every step of a solver follows the attack, so that with an encoder that was trained on attacks, windows
# among them, nothing that was measured is more robust than its guess. Of another encoder it is no defence.
_ENCODER_ALONE = ProjectionConfig(steps=0)

PRESETS: dict[str, ProjectionConfig] = {
    "reference": REFERENCE,
    # No more error on clean images than the reference.
    "accurate": ProjectionConfig(solver="lbfgs", steps=12, precision="bfloat16"),
    "robust": _ENCODER_ALONE,  # keeps most under attack
    "fast": _ENCODER_ALONE,  # what the reference keeps under attack, at the least cost
    "single_shot": _ENCODER_ALONE,  # a first look at an encoder
}
