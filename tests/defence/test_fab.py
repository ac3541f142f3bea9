"""FAB: what it has beside the other attacks of minimum norm: classes to aim at, restarts."""

from itertools import pairwise

import torch
from torch import Tensor

from manifold_defense.attacks import fab
from manifold_defense.attacks.norms import sizes
from tests.defence.attack_table import GREY, Linear, images, logits_of, network


def forked(x: Tensor) -> Tensor:
    """Class 1 comes second near x = ½, where no pixel makes it first; class 2 is first from 0.45 off on."""
    second = 1.9 + 0.01 * (x[:, 0, 0, 0] - 0.5)
    return torch.stack([torch.full_like(second, 2.0), second, 0.2 + 4 * (x[:, 0, 1, 1] - 0.5)], 1)


def test_fab_tries_the_class_that_does_not_come_second() -> None:
    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    assert torch.equal(fab(forked, x, y, norm="l2", eps=0.5), x)
    x_adv = fab(forked, x, y, norm="l2", eps=0.5, target_classes=2)
    assert (forked(x_adv).argmax(1) == 2).all()
    assert (sizes("l2", fab(forked, x, y, norm="l2", target_classes=2) - x) < 0.452).all()


def test_fab_costs_a_pass_a_step_and_more_of_it_is_no_farther() -> None:
    model, x = network(4).eval(), images(6)
    y, asked = logits_of(model, x).argmax(1), []

    def counted(x: Tensor) -> Tensor:
        asked.append(x.requires_grad)
        return model(x)

    found = [sizes("l2", fab(counted, x, y, norm="l2", steps=30) - x)]
    assert sum(asked) == 30 + 9  # 0.3 of them refine
    assert len(asked) - sum(asked) == 3  # two looks at the clean images, one at those refined
    for more in ({"target_classes": 3}, {"restarts": 3, "target_classes": 3}):
        found.append(sizes("l2", fab(model, x, y, norm="l2", steps=30, **more) - x))
    for few, many in pairwise(found):
        assert (many <= 1.01 * few).all()
        assert many.sum() <= few.sum()


def test_a_column_whose_gradient_is_nan_is_left_alone() -> None:
    model, y = Linear(m=2.0), torch.ones(3, dtype=torch.long)

    def broken(x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.index_fill(3, torch.tensor(0), torch.nan))
        return model(x)

    x_adv = fab(broken, GREY, y, norm="l2", eps=0.6)
    assert (model(x_adv).argmax(1) == 0).all()
    torch.testing.assert_close(x_adv[..., 0], GREY[..., 0])  # up to rounding


def test_once_across_a_plane_every_iterate_lies_across_it() -> None:
    """The plane is that of the point stepped back to, not of the one that the gradient was taken at."""
    model, y, across = Linear(m=2.0), torch.ones(3, dtype=torch.long), []

    def watched(x: Tensor) -> Tensor:
        logits = model(x)
        if x.requires_grad:
            across.append((logits.argmax(1) != y).tolist())
        return logits

    fab(watched, GREY, y, norm="l2", eps=float("inf"), steps=3)  # too few to refine
    assert across == [[False] * 3, [True] * 3, [True] * 3]


def test_a_step_is_the_published_mean_of_two_projections() -> None:
    """From where a later restart begins: nine tenths its own, one tenth that of the clean image, at most."""
    model, y, asked = Linear(m=2.0), torch.ones(3, dtype=torch.long), []

    def watched(x: Tensor) -> Tensor:
        if x.requires_grad:
            asked.append(x.detach())
        return model(x)

    starts = []
    for seed in (0, 1):
        asked.clear()
        fab(watched, GREY, y, norm="l2", eps=0.01, steps=2, restarts=2, seed=seed)
        first, _, start, after = asked
        assert torch.equal(first, GREY)
        off = sizes("l2", start - GREY)
        assert ((off > 0) & (off <= 0.005 + 1e-6)).all()  # half of eps, as nothing was found
        starts.append(start)
        ahead, aside = (at - gap(model, at) * model.w / model.w.square().sum() for at in (start, GREY))
        near, far = (sizes("l2", at - base).view(-1, 1, 1, 1) for at, base in ((ahead, start), (aside, GREY)))
        weight = (near / (near + far)).clamp(max=0.1)
        drawn = (1 - weight) * (start + 1.05 * (ahead - start)) + weight * (GREY + 1.05 * (aside - GREY))
        torch.testing.assert_close(after, drawn, atol=1e-4, rtol=0)
        assert (after - (start + 1.05 * (ahead - start))).abs().amax() > 1e-4  # there is something to see
    assert not torch.equal(*starts)


def gap(model: Linear, x: Tensor) -> Tensor:
    """What the difference of the logits of images x (N, C, H, W) lacks to be zero, (N, 1, 1, 1)."""
    logits = model(x)
    return (logits[:, 1] - logits[:, 0]).view(-1, 1, 1, 1)
