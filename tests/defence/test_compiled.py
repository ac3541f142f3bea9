"""Descents by way of torch.compile: the same but for rounding, and nothing left of it on the filter.

A back end that runs the traced graph as it is stands in for the one that needs a C++ compiler.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_defense import ManifoldFilter
from manifold_defense.projection import ProjectionConfig, project, project_exactly
from tests.defence.projection_support import Curved, images

CONFIGS = {
    "gd": ProjectionConfig("gd", steps=6, loss="dead_zone_linf", radius=0.1),
    "adam": ProjectionConfig("adam", steps=6, clip=1.5, prior_weight=0.01),
    "lbfgs": ProjectionConfig("lbfgs", steps=6, iterate="last", metric="none"),
    "halved": ProjectionConfig("lbfgs", restarts=4, steps=6, halve_every=2, chunk=12),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What was traced."""
    traced: list[torch.fx.GraphModule] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is))
    return traced


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_descents_end_where_the_others_do(config: ProjectionConfig, graphs: list[Any]) -> None:
    generator, x = Curved(), images(8, seed=5)
    plain = project(generator, x, config, encoder=generator.invert)
    assert not graphs
    found = project(generator, x, replace(config, compiled=True), encoder=generator.invert)
    assert len(graphs) >= 2  # the loss and the step
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_so_do_their_exact_gradients(config: ProjectionConfig, graphs: list[Any]) -> None:
    generator, gradients = Curved(), list[Tensor]()
    for each in (config, replace(config, compiled=True)):
        x = images(8, seed=5).requires_grad_(True)
        image = project_exactly(generator, x, each, encoder=generator.invert)
        gradients += torch.autograd.grad(image.square().sum(), x)
    assert graphs
    torch.testing.assert_close(*gradients)


def test_what_is_compiled_once_serves_every_call_and_batch(graphs: list[Any]) -> None:
    generator, config = Curved(), replace(CONFIGS["lbfgs"], compiled=True)
    for n in (8, 5, 6):  # the size of a batch is a number first, then any
        project(generator, images(n), config, encoder=generator.invert)
    known = len(graphs)
    for n in (7, 9, 8):
        project(generator, images(n), config, encoder=generator.invert)
    assert len(graphs) == known


def test_a_filter_can_be_copied_and_pickled_as_before(networks: Any, digits: Any, graphs: list[Any]) -> None:
    filter = ManifoldFilter(*networks, config=ProjectionConfig("lbfgs", steps=3, compiled=True))
    drawn = filter(digits[0][:4])
    assert graphs
    assert torch.equal(pickle.loads(pickle.dumps(filter))(digits[0][:4]), drawn)


def test_it_is_yes_or_no() -> None:
    with pytest.raises(ValueError, match=r"^compiled: expected true or false, got 1$"):
        ProjectionConfig(compiled=1)  # type: ignore[arg-type]
