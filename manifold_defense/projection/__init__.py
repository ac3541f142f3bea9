"""Latent inversion: onto the generator's range, and its gradients."""

from manifold_defense.projection.config import REFERENCE, ProjectionConfig
from manifold_defense.projection.descent import check_images, project, project_exactly

__all__ = ["REFERENCE", "ProjectionConfig", "check_images", "project", "project_exactly"]
