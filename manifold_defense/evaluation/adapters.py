"""A second opinion: our models under the attacks of other libraries.

    foolbox_model     what the attacks of foolbox take
    art_classifier    what those of the Adversarial Robustness Toolbox take
    autoattack        AutoAttack (Croce & Hein 2020), a function like our own attacks

    fmodel = foolbox_model(defended.view("tangent"))
    _, x_adv, _ = foolbox.attacks.LinfPGD()(fmodel, x, y, epsilons=0.15)

Peers are optional: `pip install "manifold-defense[peers]"`. They switch modes, leave gradients on
parameters and draw from the global generators, so each is handed a frozen copy: what they do to it
leaves no trace on the model, and a model that is trained on has to be adapted anew. A defended
classifier is differentiated in the view that it stands in, exact unless another was asked for.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import correct
from manifold_defense.types import Classifier, Norm

# The authors' package, the same on PyPI, and a port.
_AUTOATTACKS = ("autoattack", "pyautoattack", "torchattacks")
_STEPS = 100  # of every gradient attack in the paper; the port's own default is 10, which is far weaker


class _Peer(nn.Module):
    """A frozen copy in eval mode of a classifier, images (N, C, H, W) to logits (N, K)."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        # Peers look for the device at the first parameter, and not every model has one.
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device = tensors[0].device if tensors else None
        kind = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        self.place = nn.Parameter(torch.empty(0, device=device, dtype=kind))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> _Peer:
        """Stay in eval mode, whatever a peer asks for."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        # Tanh space and sums of projections end a rounding error outside, which a filter refuses. The
        # gradient is that of the identity: `clamp` may have none at exactly 0 and 1, where many pixels
        # are, and would mask the model from every peer. NumPy turns images into double precision unasked.
        x = x.to(self.place.dtype)
        logits: Tensor = self.model(x + (x.clamp(0, 1) - x).detach())
        return logits


def foolbox_model(model: Classifier) -> Any:
    """A `foolbox.PyTorchModel` of a classifier that takes images (N, C, H, W) in [0, 1]."""
    foolbox = _load("foolbox")
    peer = _Peer(model)
    return foolbox.PyTorchModel(peer, bounds=(0, 1), device=peer.place.device)


def art_classifier(model: Classifier, image_shape: tuple[int, int, int], classes: int) -> Any:
    """A `PyTorchClassifier` of ART for images of `image_shape` (C, H, W) in [0, 1]; it speaks NumPy."""
    estimators = _load("art.estimators.classification")
    peer = _Peer(model)
    return estimators.PyTorchClassifier(
        model=peer,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(image_shape),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu" if peer.place.device.type == "cpu" else "gpu",
    )


def autoattack(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.3,
    version: str = "standard",
    package: str | None = None,
    seed: int = 0,
) -> Tensor:
    """AutoAttack on images (N, C, H, W) with labels y (N,), by `package` or the first that is installed.

    Packages are `autoattack`, `pyautoattack` and `torchattacks`, which is made to take the published
    100 steps. Returns images in [0, 1] and inside the ball, clean where nothing was found. `version`:
    standard, plus, or rand for a randomised model. At least 4 classes, for its targeted loss compares
    four logits.
    """
    if package not in (None, *_AUTOATTACKS):
        raise ValueError(f"package: expected one of {', '.join(_AUTOATTACKS)}, got {package!r}")
    name = {"linf": "Linf", "l2": "L2"}.get(norm)
    if name is None:
        raise ValueError(f"autoattack: expected norm linf or l2, got {norm!r}")
    if len(x) == 0:
        return x.detach()
    peer, x = _Peer(model), x.detach()
    with torch.no_grad():
        classes = peer(x[:1]).shape[1]
    if classes < 4:
        raise ValueError(f"autoattack: expected at least 4 classes, got {classes}")
    library = _load(*(_AUTOATTACKS if package is None else (package,)))
    settings = {"norm": name, "eps": eps, "version": version, "seed": seed}
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        if library.__name__ == "torchattacks":
            attack = library.AutoAttack(peer, n_classes=classes, **settings)
            for part in attack._autoattack.attacks:
                if hasattr(part, "steps"):
                    part.steps = _STEPS
            x_adv = attack(x, y)
        else:
            attack = library.AutoAttack(peer, device=x.device, **settings)
            attack.verbose = False
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
            found = attack.run_standard_evaluation(x, y)
            x_adv = found[0] if isinstance(found, tuple) else found  # with its labels on PyPI
    delta = geometry(norm).project(x_adv.detach().to(x) - x, eps)
    x_adv = (x + delta).clamp(0, 1)
    with torch.no_grad():
        broken = ~correct(peer(x_adv), y)
    return torch.where(broken.view(-1, 1, 1, 1), x_adv, x)


def _load(*modules: str) -> Any:
    """The first of some modules that is there, or one line that says how to get it."""
    reasons = []
    for module in modules:
        try:
            return import_module(module)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError(
        f'{" or ".join(modules)} cannot be imported ({reasons[0]}); pip install "manifold-defense[peers]"'
    )
