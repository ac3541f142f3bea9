"""Agreement: the divergence of a classifier's answers, against its definition."""

import math

import torch
from torch import nn

from manifold_defense.hardening.agreement import Agreement
from tests.defence.attack_table import images, network


class Sum(nn.Module):
    """Two classes, the first by the sum of an image's pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.weight * x.flatten(1).sum(1)
        return torch.stack([total, torch.zeros_like(total)], 1)


def test_disagreement_is_the_divergence_from_what_the_image_means() -> None:
    x = torch.tensor([0.0, math.log(3)]).view(2, 1, 1, 1)  # answers 1/2, 1/2 and 3/4, 1/4
    apart = Agreement(Sum())(x)(x.flip(0))
    expected = [
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    ]
    torch.testing.assert_close(apart, torch.tensor(expected))


def test_what_means_the_same_agrees_and_what_does_not_has_a_gradient() -> None:
    x, model = images(5), network(3).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    apart = Agreement(model)(x)
    torch.testing.assert_close(apart(x), torch.zeros(5), atol=1e-6, rtol=0)
    drawings = (1 - x).requires_grad_(True)
    (gradient,) = torch.autograd.grad(apart(drawings).sum(), drawings)
    assert (apart(drawings) > 0).all()
    assert gradient.flatten(1).any(1).all()
    assert not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
