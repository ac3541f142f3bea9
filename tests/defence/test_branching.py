"""Branch and bound behind a threshold, against all images of a box, one by one."""

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan.optimisation import seeded
from manifold_defense.certification import (
    branching_certificates,
    certified_accuracy,
    decide,
    interval_certificates,
    intervals_prove,
)
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.evaluation.baselines import Binarise, Blur, Preprocessed

EPS = 0.2


@pytest.fixture(scope="module")
def binarised(digits: Any) -> Preprocessed:
    """Trained a little on binarised digits: some boxes are proved, some are not."""
    x, y = digits
    model = Preprocessed(
        Binarise(), seeded(0, lambda: ImageClassifier((1, 8, 8), 10, ArchitectureConfig(width=4)))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def boxes_of(x: Tensor, count: int) -> Tensor:
    """Images (N, C, H, W) whose box holds 2^count binary ones: all but so many pixels lie out of reach."""
    sure = (x > 0.5).float()
    near = x.flatten(1).sub(0.5).abs().topk(count, largest=False).indices
    grey = torch.where(sure.flatten(1).gather(1, near) > 0, 0.6, 0.4)
    return sure.flatten(1).scatter(1, near, grey).view_as(x)


def labels_in(model: Preprocessed, x: Tensor) -> set[int]:
    """Of every binary image in the box of x (1, 8, 8)."""
    free = ((x - 0.5).abs() < EPS).flatten().nonzero()[:, 0]
    every = (x > 0.5).float().flatten().repeat(2 ** len(free), 1)
    every[:, free] = torch.tensor(list(product((0.0, 1.0), repeat=len(free))))
    with torch.no_grad():
        return set(model(every.view(-1, 1, 8, 8)).argmax(1).tolist())


@pytest.mark.parametrize("count", [1, 9])
def test_decides_as_trying_all_images_does(binarised: Preprocessed, digits: Any, count: int) -> None:
    x, y = boxes_of(digits[0][:60], count), digits[1][:60]
    found = decide(binarised, x, y, EPS, boxes=2_000)
    every = [labels_in(binarised, image) for image in x]
    expected = torch.tensor([labels == {int(label)} for labels, label in zip(every, y, strict=True)])
    assert torch.equal(found.proved, expected)
    assert torch.equal(found.broken, ~expected)
    # The bounds alone do not come as far.
    alone = intervals_prove(binarised, x, y, EPS)
    assert (alone <= expected).all()
    assert alone.sum() < expected.sum() < len(x)


def test_decides_where_the_last_neurons_are_a_convolution_s(binarised: Preprocessed, digits: Any) -> None:
    classifier = seeded(0, lambda: ImageClassifier((1, 8, 8), 10, ArchitectureConfig("shallow", width=2)))
    conv = seeded(2, lambda: nn.Conv2d(1, 2, 3, padding=1))
    classifier.body = nn.Sequential(conv, nn.ReLU(), nn.Flatten())
    classifier.head = seeded(1, lambda: nn.Linear(128, 10))
    model = Preprocessed(Binarise(), classifier.eval())
    x = boxes_of(digits[0][:30], 4)
    with torch.no_grad():
        y = model(x).argmax(1)
    found = decide(model, x, y, EPS, boxes=500)
    for i in range(len(x)):
        alone = labels_in(model, x[i]) == {int(y[i])}
        assert (bool(found.proved[i]), bool(found.broken[i])) == (alone, not alone)
    assert 0 < found.proved.sum() < len(x)


def test_an_image_that_refutes_is_one(binarised: Preprocessed, digits: Any) -> None:
    x, y = digits[0][:60], digits[1][:60]
    found = decide(binarised, x, y, EPS, boxes=50)
    assert 0 < found.broken.sum() < len(x)
    assert not (found.proved & found.broken).any()
    moved = found.x_adv[found.broken]
    assert (moved - x[found.broken]).abs().max() <= EPS + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    with torch.no_grad():
        assert (binarised(moved).argmax(1) != y[found.broken]).all()
    assert torch.equal(found.x_adv[~found.broken], x[~found.broken])


def test_one_box_is_the_linear_bounds_and_more_boxes_decide_more(
    binarised: Preprocessed, digits: Any
) -> None:
    x, y = digits[0][:60], digits[1][:60]
    few, some = (decide(binarised, x, y, EPS, boxes=boxes) for boxes in (1, 200))
    by_intervals = intervals_prove(binarised, x, y, EPS)
    assert (few.proved >= by_intervals).all()
    assert few.proved.sum() > by_intervals.sum()
    assert (some.proved >= few.proved).all()
    assert (some.broken >= few.broken).all()
    assert (some.proved | some.broken).sum() > (few.proved | few.broken).sum()


def test_an_image_is_decided_by_itself(binarised: Preprocessed, digits: Any) -> None:
    x, y = digits[0][:12], digits[1][:12]
    together = decide(binarised, x, y, EPS, boxes=100)
    for i in range(len(x)):
        alone = decide(binarised, x[i : i + 1], y[i : i + 1], EPS, boxes=100)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))
    none = decide(binarised, x[:0], y[:0], EPS)
    assert [value.shape for value in none] == [(0,), (0,), (0, 1, 8, 8)]


@pytest.mark.parametrize("eps", [0.0, 0.04])
def test_what_is_wrong_already_is_broken_by_itself(binarised: Preprocessed, digits: Any, eps: float) -> None:
    x = digits[0][:60]
    second = binarised(x).topk(2).indices[:, 1]
    found = decide(binarised, x, second, eps, boxes=1)
    assert found.broken.all()
    assert torch.equal(found.x_adv, x)


def test_nan_proves_nothing(binarised: Preprocessed, digits: Any) -> None:
    """Label 0 is what argmax makes of ten NaN, so that no image refutes it either."""
    lost = deepcopy(binarised)
    lost.classifier.head.bias.data.fill_(torch.nan)
    x, y = digits[0][:5], torch.zeros(5, dtype=torch.long)
    found = decide(lost, x, y, EPS, boxes=10)
    assert not found.proved.any()
    assert (branching_certificates(lost, x, radii=(EPS,), boxes=10).radius == 0).all()


def test_the_radius_is_the_largest_of_those_asked(binarised: Preprocessed, digits: Any) -> None:
    x, radii = digits[0][:40], (0.2, 0.05, 0.1)
    found = branching_certificates(binarised, x, radii=radii, boxes=200)
    bounds = interval_certificates(binarised, x)
    assert torch.equal(found.prediction, bounds.prediction)
    of_bounds = torch.zeros(len(x), dtype=torch.float64)
    for eps in sorted(radii):
        of_bounds[intervals_prove(binarised, x, bounds.prediction, eps)] = eps
        proved = decide(binarised, x, bounds.prediction, eps, boxes=200).proved
        assert torch.equal(found.radius >= eps, proved)
    assert (found.radius >= of_bounds).all()
    assert (found.radius > of_bounds).any()
    assert set(found.radius.tolist()) == {
        0.0,
        *radii,
    }  # to the bit: of 0.2 in float32 nothing is proved at 0.2
    right = certified_accuracy(found, found.prediction, radii).tolist()
    assert right == [float((found.radius == eps).sum() + (found.radius > eps).sum()) / 40 for eps in radii]


def test_says_what_it_cannot_follow(binarised: Preprocessed, digits: Any) -> None:
    x, y = digits[0][:2], digits[1][:2]
    for model in (binarised.classifier, Preprocessed(Blur(), binarised.classifier)):
        follows: Any = model
        with pytest.raises(TypeError, match="behind Binarise, got "):
            decide(follows, x, y, EPS)
    with pytest.raises(TypeError, match="ImageClassifier, got Sequential"):
        decide(Preprocessed(Binarise(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), x, y, EPS)
    with pytest.raises(ValueError, match="eps: expected at least 0, got nan"):
        decide(binarised, x, y, float("nan"))
    with pytest.raises(ValueError, match="boxes: expected at least 1, got 0"):
        decide(binarised, x, y, EPS, boxes=0)
    for images, said in (
        (255 * x, r"images: expected values in \[0, 1\], got \[0, 255\]"),
        ((255 * x).byte(), "images: expected floats"),
        (x[:, :, :4], r"images: expected shape \(N, 1, 8, 8\), got \(2, 1, 4, 8\)"),
    ):
        for asked in (decide, intervals_prove):
            with pytest.raises(ValueError, match=said):
                asked(binarised, images, y, EPS)


def test_inference_mode_changes_no_verdict(binarised: Preprocessed, digits: Any) -> None:
    x, y = digits[0][:10], digits[1][:10]
    outside = decide(binarised, x, y, EPS, boxes=50)
    with torch.inference_mode():
        inside = decide(binarised, x + 0, y + 0, EPS, boxes=50)
    assert (outside.proved | outside.broken).any()
    assert all(torch.equal(*pair) for pair in zip(outside, inside, strict=True))
