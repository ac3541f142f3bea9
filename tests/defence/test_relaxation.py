"""Linear bounds against what networks make of images inside the boxes, and where they are exact."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan.optimisation import seeded
from manifold_defense.certification import linear_worst_margin
from manifold_defense.certification.intervals import Box, box_logits, hidden_boxes
from manifold_defense.certification.relaxation import fitted_lines, lead_bounds, tightened
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier

OTHERS = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9])
LABEL = torch.tensor(3)


def odd() -> nn.Sequential:
    """Kernels that are not square, strides and paddings that differ, groups, holes, layers without a bias."""
    return nn.Sequential(
        nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(0, 1)),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, dilation=2, groups=2, bias=False),
        nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(42, 20),
        nn.ReLU(),
        nn.Linear(20, 128, bias=False),
    )


def network(name: Any) -> ImageClassifier:
    """In float64."""

    def build() -> ImageClassifier:
        config = ArchitectureConfig("cnn" if name == "odd" else name, width=4)
        model = ImageClassifier((1, 8, 8), 10, config, torch.tensor([0.3]), torch.tensor([0.4]))
        if name == "odd":
            model.body = odd()
        return model

    return seeded(0, build).double().eval().requires_grad_(False)


def boxes(digits: Any, count: int, size: float) -> Box:
    x = digits[0][:count].double()
    return Box((x - size).clamp(0, 1), (x + size).clamp(0, 1))


def inside(box: Box, count: int) -> Tensor:
    """Images (count, B, C, H, W) of boxes: corners, and one in eight anywhere."""
    rng = torch.Generator().manual_seed(0)
    share = torch.rand((count, *box.lower.shape), generator=rng, dtype=torch.float64)
    share[count // 8 :] = share[count // 8 :].round()
    return box.lower + share * (box.upper - box.lower)


def relu_inputs(model: ImageClassifier, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    relus = [layer for layer in model.body if isinstance(layer, nn.ReLU)]
    handles = [relu.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for relu in relus]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def leads(model: ImageClassifier, x: Tensor) -> Tensor:
    z = model(x)
    return z[:, OTHERS] - z[:, LABEL].unsqueeze(1)


@pytest.mark.parametrize("name", ["cnn", "shallow", "odd"])
@pytest.mark.parametrize("size", [0.02, 0.1, 0.5])
def test_no_image_of_a_box_is_outside_its_bounds(digits: Any, name: str, size: float) -> None:
    model, whole = network(name), boxes(digits, 6, size)
    for i in range(6):
        box = Box(whole.lower[i : i + 1], whole.upper[i : i + 1])
        images = inside(box, 400)[:, 0]
        loose = hidden_boxes(model, box)
        tight = tightened(model, box).boxes
        for value, wide, narrow in zip(relu_inputs(model, images), loose, tight, strict=True):
            assert (wide.lower <= narrow.lower).all()
            assert (narrow.upper <= wide.upper).all()
            assert (value >= narrow.lower - 1e-12).all()
            assert (value <= narrow.upper + 1e-12).all()
        true = leads(model, images)
        fitted = fitted_lines(model, box, tight, LABEL, OTHERS)
        for hidden, lines in ((loose, None), (tight, None), (tight, fitted)):
            bounds = lead_bounds(model, hidden, LABEL, OTHERS, lines)
            line = images.flatten(1) @ bounds.slope[0].flatten(1).T + bounds.offset
            largest = bounds.largest(box)
            assert (true <= line + 1e-12).all()
            assert (line <= largest + 1e-12).all()


@pytest.mark.parametrize("name", ["cnn", "shallow", "odd"])
def test_they_are_tighter_than_intervals(digits: Any, name: str) -> None:
    model, whole = network(name), boxes(digits, 6, 0.1)
    worst = inside(whole, 400).flatten(0, 1)
    true = leads(model, worst).unflatten(0, (400, 6)).amax(0)
    by_intervals = box_logits(model, *whole, LABEL.expand(6))[:, OTHERS]
    loose = hidden_boxes(model, whole)
    together = lead_bounds(model, loose, LABEL, OTHERS).largest(whole)
    for i in range(6):
        box = Box(whole.lower[i : i + 1], whole.upper[i : i + 1])
        own = [Box(wide.lower[i : i + 1], wide.upper[i : i + 1]) for wide in loose]
        once = lead_bounds(model, own, LABEL, OTHERS).largest(box)[0]
        torch.testing.assert_close(once, together[i], atol=1e-12, rtol=0)
        twice = lead_bounds(model, tightened(model, box).boxes, LABEL, OTHERS).largest(box)[0]
        excess = [(bound - true[i]).mean() for bound in (by_intervals[i], once, twice)]
        assert 0 < excess[2] < 0.8 * excess[1]
        assert excess[1] < 0.8 * excess[0]


@pytest.mark.parametrize("name", ["cnn", "shallow", "odd"])
def test_they_are_exact_where_no_relu_bends(digits: Any, name: str) -> None:
    """A point, and a box in which every neuron is on: there a network is one linear function."""
    model, point = network(name), boxes(digits, 6, 0.0)
    bounds = lead_bounds(model, hidden_boxes(model, point), LABEL, OTHERS).largest(point)
    torch.testing.assert_close(bounds, leads(model, point.lower), atol=1e-12, rtol=0)

    for layer in model.body:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.abs_()
            layer.bias = nn.Parameter(torch.full((len(layer.weight),), 10.0).double())
    box = boxes(digits, 6, 0.2)
    hidden = hidden_boxes(model, box)
    assert all((each.lower > 0).all() for each in hidden)
    zero, pixels = torch.zeros(1, 1, 8, 8).double(), torch.eye(64).double().view(64, 1, 8, 8)
    bias = model(zero)[0]
    weight = (model(pixels) - bias).T
    x, y = digits[0][:6].double(), LABEL.expand(6)
    lowest = linear_worst_margin(weight, bias, x, y, norm="linf", eps=0.2)
    bounds = lead_bounds(model, hidden, LABEL, OTHERS).largest(box)
    torch.testing.assert_close(-bounds.amax(1), lowest, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["cnn", "shallow", "odd"])
def test_fitted_lines_bring_the_bounds_down_and_hold_in_parts(digits: Any, name: str) -> None:
    model, box = network(name).requires_grad_(True), boxes(digits, 1, 0.1)
    with torch.no_grad():
        hidden = tightened(model, box)
        lines = fitted_lines(model, box, hidden.boxes, LABEL, OTHERS)
        plain, fitted = (
            lead_bounds(model, hidden.boxes, LABEL, OTHERS, given).largest(box) for given in (None, lines)
        )
        middle = (box.lower + box.upper) / 2
        part = Box(torch.cat([box.lower, middle]), torch.cat([middle, box.upper]))
        known = hidden_boxes(model, part, hidden.within(part))
        bounds = lead_bounds(model, known, LABEL, OTHERS, lines).largest(part)
        true = leads(model, inside(part, 200).flatten(0, 1)).unflatten(0, (200, 2)).amax(0)
    assert all(((line >= 0) & (line <= 1)).all() for line in lines)
    assert fitted.sum() < plain.sum() - 0.01 * (plain - leads(model, middle)).sum()
    assert (true <= bounds + 1e-12).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_known_already_is_kept(digits: Any) -> None:
    """Bounds of a box hold in its parts: there they are met with the part's own, layer by layer."""
    model, box = network("shallow"), boxes(digits, 1, 0.3)
    middle = (box.lower + box.upper) / 2
    halves = Box(torch.cat([box.lower, middle]), torch.cat([middle, box.upper]))
    known = tightened(model, box)
    within = known.within(halves)
    met = hidden_boxes(model, halves, within)
    for alone, whole, both in zip(hidden_boxes(model, halves), within, met, strict=True):
        assert (both.lower >= torch.maximum(alone.lower, whole.lower)).all()
        assert (both.upper <= torch.minimum(alone.upper, whole.upper)).all()
    images = inside(halves, 200).transpose(0, 1).flatten(0, 1)
    for value, bound in zip(relu_inputs(model, images), met, strict=True):
        value = value.unflatten(0, (2, 200))
        assert (value >= bound.lower.unsqueeze(1) - 1e-12).all()
        assert (value <= bound.upper.unsqueeze(1) + 1e-12).all()
    # The last layer's are the tighter, the smaller the part.
    assert len(known.neurons) > 1
    size, smaller = (
        (end.upper - end.lower)[:, known.neurons].sum(1) for end in (known.boxes[-1], within[-1])
    )
    assert (smaller < size).all()


def test_nan_stays_nan(digits: Any) -> None:
    model, box = network("cnn"), boxes(digits, 1, 0.1)
    assert isinstance(model.body[0], nn.Conv2d)
    model.body[0].bias[0] = torch.nan
    tight = tightened(model, box)
    assert lead_bounds(model, tight.boxes, LABEL, OTHERS).largest(box).isnan().all()
