"""Agreement: the divergence of a classifier's answers, against its definition."""

import math

import torch
from torch import nn

from gan import Encoder, Generator
from manifold_defense import DefendedClassifier, ManifoldFilter
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
    apart = Agreement(Sum(), x).apart(x, x.flip(0))
    expected = [
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        0.75 * math.log(1.5) + 0.25 * math.log(0.5),
    ]
    torch.testing.assert_close(apart, torch.tensor(expected))


def test_the_lead_is_of_any_other_class_over_that_of_the_image() -> None:
    """Whatever its label: f says the first of x = 1, the second of x = −1."""
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    lead = Agreement(Sum(), x).lead(x, torch.tensor([0.25, 0.5]).view(2, 1, 1, 1))
    torch.testing.assert_close(lead, torch.tensor([-0.25, 0.5]))


def test_what_means_the_same_agrees_and_what_does_not_has_a_gradient() -> None:
    x, model = images(5), network(3).eval().requires_grad_(False)
    agreement = Agreement(model, x)
    torch.testing.assert_close(agreement.apart(x, x), torch.zeros(5), atol=1e-6, rtol=0)
    assert (agreement.lead(x, x) < 0).all()
    drawings = (1 - x).requires_grad_(True)
    assert (agreement.apart(x, drawings) > 0).all()
    for measure in (agreement.apart, agreement.lead):
        (gradient,) = torch.autograd.grad(measure(x, drawings).sum(), drawings)
        assert gradient.flatten(1).any(1).all()


def test_with_a_share_the_answer_is_that_of_the_defended_classifier(
    networks: tuple[Generator, Encoder],
) -> None:
    x, model = images(5), network(3).eval().requires_grad_(False)
    filter = ManifoldFilter(*networks).requires_grad_(False)
    attacked = (x + 0.1).clamp(0, 1)
    drawings = filter(attacked)
    answers = DefendedClassifier(filter, model, share=0.3)(attacked)
    agreement, meant = Agreement(model, x, share=0.3), model(x)
    others = answers.scatter(1, meant.argmax(1, keepdim=True), -torch.inf).max(1).values
    lead = others - answers.gather(1, meant.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(agreement.lead(attacked, drawings), lead)
    apart = (meant.softmax(1) * (meant.log_softmax(1) - answers)).sum(1)
    torch.testing.assert_close(agreement.apart(attacked, drawings), apart)
    assert not torch.allclose(lead, Agreement(model, x).lead(attacked, drawings))
