"""A generative-manifold defence for image classifiers, and what it is worth.

Works against any `Generator` (see `types`); needs torch and safetensors to run.
"""

from manifold_defense.artifact import (
    ArtifactError,
    load_classifier,
    load_filter,
    save_classifier,
    save_filter,
)
from manifold_defense.filter import DefendedClassifier, ManifoldFilter
from manifold_defense.projection import PRESETS, REFERENCE, ProjectionConfig, project
from manifold_defense.types import Generator, Projection, Threat

__all__ = [
    "PRESETS",
    "REFERENCE",
    "ArtifactError",
    "DefendedClassifier",
    "Generator",
    "ManifoldFilter",
    "Projection",
    "ProjectionConfig",
    "Threat",
    "load_classifier",
    "load_filter",
    "project",
    "save_classifier",
    "save_filter",
]
