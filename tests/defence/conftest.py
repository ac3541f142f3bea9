"""A small classifier of digits' size, bare and behind a filter; a filter whose manifold is known."""

from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from manifold_defense import DefendedClassifier, ManifoldFilter, ProjectionConfig
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.hardening import Pgd
from tests.defence.hardening_support import Encoder, Mixtures, trained


@pytest.fixture
def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture
def defended(linear: Any, classifier: nn.Module) -> DefendedClassifier:
    filter = ManifoldFilter(linear.float(), config=ProjectionConfig("gd", "origin", steps=30))
    return DefendedClassifier(filter, classifier)


@pytest.fixture(scope="module")
def manifold(digits: Any) -> ManifoldFilter:
    mixtures = Mixtures(digits[0])
    return ManifoldFilter(mixtures, Encoder(mixtures), ProjectionConfig(steps=0))


@pytest.fixture(scope="module")
def hardened(fabric: Fabric, digits: Any) -> ImageClassifier:
    return trained(fabric, digits, Pgd(eps=0.1, steps=2))
