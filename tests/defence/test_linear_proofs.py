"""Proofs of linear classifiers: exact, against optimisers, closed forms and attacks."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from manifold_defense.attacks import apgd
from manifold_defense.certification import (
    linear_certificates,
    linear_worst_margin,
)
from manifold_defense.types import Ball


@pytest.fixture(scope="module")
def linear() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (4, 6), biases (4,), images (5, 1, 2, 3) near and at the bounds, labels (5,)."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    x = torch.rand(5, 1, 2, 3, generator=rng, dtype=torch.float64)
    x[0, 0, 0] = 0.0
    return weight, torch.randn(4, generator=rng, dtype=torch.float64), x, torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7, 3.0])
def test_the_worst_margin_is_that_of_an_optimiser(linear: Any, norm: Any, eps: float) -> None:
    weight, bias, x, y = linear
    found = linear_worst_margin(weight, bias, x, y, norm=norm, eps=eps)
    for i, (image, label) in enumerate(zip(x.flatten(1).numpy(), y.tolist(), strict=True)):
        margins = []
        for other in set(range(4)) - {label}:
            slope = (weight[label] - weight[other]).numpy()
            margin = float(slope @ image + bias[label] - bias[other])
            margins.append(margin + fall(slope, image, norm, eps))
        assert float(found[i]) == pytest.approx(min(margins), abs=2e-6)


def fall(slope: Any, image: Any, norm: str, eps: float) -> float:
    """`min ⟨slope, δ⟩` in ball and box, by scipy."""
    bounds = list(zip(-image, 1 - image, strict=True))
    if norm == "linf":
        return float(linprog(slope, bounds=[(max(a, -eps), min(b, eps)) for a, b in bounds]).fun)
    if norm == "l1":  # δ = p − n
        both = np.concatenate([slope, -slope])
        limits = [(0, b) for _, b in bounds] + [(0, -a) for a, _ in bounds]
        return float(linprog(both, A_ub=np.ones((1, 12)), b_ub=[eps], bounds=limits).fun)
    constraint = {"type": "ineq", "fun": lambda d: eps**2 - d @ d, "jac": lambda d: -2 * d}
    start = np.clip(-1e-3 * slope, [a for a, _ in bounds], [b for _, b in bounds]) * min(eps, 1.0)
    found = minimize(
        lambda d: slope @ d,
        start,
        jac=lambda d: slope,
        bounds=bounds,
        constraints=[constraint],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return float(found.fun)


def test_the_worst_margin_without_bounds_is_the_dual_norm(linear: Any) -> None:
    weight, bias, x, y = linear
    logits = x.flatten(1) @ weight.T + bias
    duals: dict[Ball, float] = {"linf": 1, "l2": 2, "l1": float("inf")}
    for norm, dual in duals.items():
        slopes = torch.linalg.vector_norm(weight[y].unsqueeze(1) - weight, ord=dual, dim=2)
        expected = logits.gather(1, y.unsqueeze(1)) - logits - 0.3 * slopes
        expected = expected.scatter(1, y.unsqueeze(1), torch.inf).amin(1)
        wide = (-1e9, 1e9)
        found = linear_worst_margin(weight, bias, x, y, norm=norm, eps=0.3, bounds=wide)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_an_attack_reaches_the_worst_margin_and_goes_no_lower(linear: Any, norm: Any) -> None:
    weight, bias, x, y = linear

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T + bias

    worst = linear_worst_margin(weight, bias, x, y, norm=norm, eps=0.4)
    x_adv = apgd(model, x, y, norm=norm, eps=0.4, steps=100, loss="margin", stop_early=False)
    logits = model(x_adv)
    reached = logits.gather(1, y.unsqueeze(1)).squeeze(1) - logits.scatter(
        1, y.unsqueeze(1), -torch.inf
    ).amax(1)
    assert (reached >= worst - 1e-5).all()  # the images are float32 inside the attack
    assert (reached <= worst + 0.05).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_linear_radius_is_where_the_margin_vanishes(linear: Any, norm: Any) -> None:
    weight, bias, x, _ = linear
    found = linear_certificates(weight, bias, x, norm=norm)
    for i, radius in enumerate(found.radius.tolist()):
        one = (x[i : i + 1], found.prediction[i : i + 1])
        for share, safe in ((0.999, True), (1.001, False)):
            margin = linear_worst_margin(
                weight, bias, *one, norm=norm, eps=share * radius, bounds=(-1e9, 1e9)
            )
            assert bool(margin > 0) is safe


def test_a_linear_proof_says_what_it_expects(linear: Any) -> None:
    with pytest.raises(ValueError, match="norm: expected one of linf, l2, l1, got 'l0'"):
        linear_worst_margin(*linear, norm="l0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps: expected at least 0"):
        linear_worst_margin(*linear, eps=-1.0)
