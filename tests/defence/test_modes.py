"""In which mode a model is asked: eval, whatever kind of callable holds it, and its own again afterwards."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from manifold_defense import Threat
from manifold_defense.attacks import pgd
from manifold_defense.evaluation import AttackConfig, Defence, evaluate
from manifold_defense.modes import evaluation_mode

NET = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))


def by_name(x: Tensor) -> Tensor:
    logits: Tensor = NET(x)
    return logits


def given(x: Tensor, net: nn.Module = NET) -> Tensor:
    logits: Tensor = net(x)
    return logits


def closing_over(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x) / 2


class Holder:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.answer(x)

    def answer(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


class Wrapped(nn.Module):
    """A module that has a function for its model."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


MODELS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": NET,
    "name": by_name,
    "default": given,
    "closure": closing_over(NET),
    "partial": partial(given, net=NET),
    "method": Wrapped(NET).forward,
    "object": Holder(NET),
    "nested": Wrapped(closing_over(NET)),
    "twice": closing_over(Wrapped(partial(given, net=NET))),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_is_found_and_gets_its_mode_back(name: str) -> None:
    NET.train()
    NET[2].eval()
    with evaluation_mode(MODELS[name]):
        assert not any(module.training for module in NET.modules())
    assert [module.training for module in NET] == [True, True, False]


@pytest.mark.parametrize("name", ["module", "closure", "nested"])
def test_an_attack_and_an_evaluation_leave_batch_statistics_alone(name: str) -> None:
    NET.train()
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = NET[1].running_mean.clone()
    NET.eval()
    y = MODELS[name](x).argmax(1)
    alone = torch.cat([MODELS[name](image) for image in x.split(1)])
    NET.train()
    pgd(MODELS[name], x, y, eps=0.05, steps=2)
    found = evaluate(
        [Defence.of("a", MODELS[name])], [AttackConfig("fgsm")], [Threat("linf", 0.01)], x, y, checks=6
    )
    assert found.rows[0].robust_accuracy == 1.0  # as eval mode answers
    assert torch.equal(NET[1].running_mean, before)
    assert NET.training
    assert alone.argmax(1).tolist() == y.tolist()


def test_what_is_no_module_is_left_alone() -> None:
    with evaluation_mode(len, Holder(NET), None, partial(max, 1)):
        pass
    recursive: list[Callable[[Tensor], Tensor]] = []
    recursive.append(lambda x: recursive[0](x))
    with evaluation_mode(recursive[0]):
        pass
