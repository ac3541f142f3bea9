"""Latent inversion: onto the generator's range, and its gradients."""

from manifold_defense.projection.config import ProjectionConfig
from manifold_defense.projection.descent import (
    check_images,
    project,
    project_exactly,
    project_softly,
    surroundings,
)
from manifold_defense.projection.implicit import attach_gradient, stationarity
from manifold_defense.projection.metric import Metric, mean_metric
from manifold_defense.projection.presets import PRESETS, REFERENCE
from manifold_defense.projection.starts import Bank, make_bank

__all__ = [
    "PRESETS",
    "REFERENCE",
    "Bank",
    "Metric",
    "ProjectionConfig",
    "attach_gradient",
    "check_images",
    "make_bank",
    "mean_metric",
    "project",
    "project_exactly",
    "project_softly",
    "stationarity",
    "surroundings",
]
