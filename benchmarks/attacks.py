"""Our attacks beside those of foolbox, torchattacks and ART: what each finds at the same budget, how fast.

    python benchmarks/attacks.py --json attacks.json

Two classifiers of the digits are trained first as the pipeline trains them: a standard one, and one
hardened with PGD at L∞ 0.15. Both are attacked, and figures of the hardened one stand at the top of
the JSON, those of the other below `standard`. A peer that is not installed is left out:

    pip install "manifold-defense[peers]"     # torchattacks wants an old `requests`; to keep yours:
    pip install foolbox adversarial-robustness-toolbox pyautoattack && pip install --no-deps torchattacks

    pgd40     PGD of 40 gradient passes at L∞ 0.15, steps of 2.5 eps / 40 (ours: from eps falling to 0)
    apgd40    APGD of 40 passes on cross-entropy; apgd40_dlr: on the logits' ratio
    classes40 ten passes of APGD-T towards each of four classes; ours_pgd: of PGD; ours_divided: eight
              of PGD on cross-entropy, then towards each of four
    ddn100    DDN and FMN of 100 passes: median L2 distance over all images
    fab900    FAB towards nine classes, 100 passes each, at L∞ 0.15 (torchattacks' port)
    cw300     C&W of 300 passes, searches on the constant included: likewise
    suite     everything at L∞ 0.15, each attack on what those before it left, against AutoAttack: of the
              published 100 steps by torchattacks' port (`autoattack`) and by its authors' package, and
              the port as it is shipped, of 10 steps

One thread, the whole batch at once, contenders by turns `--repeats` times, each time from another
seed: robust accuracy is the mean over these, speed is the median of images per CPU second. Every
image is predicted again: one that is still right, or outside the ball or [0, 1], is no success, at
distance infinity where distance counts. `gradient_passes` are counted, per image, not taken from
the settings. Ours drops images once they are fooled, so it takes fewer passes where more are.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import torch
from inputs import benchmark, json_option
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from manifold_defense import load_classifier
from manifold_defense.attacks import cw, pgd
from manifold_defense.attacks.apgd import apgd
from manifold_defense.attacks.ddn import ddn
from manifold_defense.attacks.fab import fab
from manifold_defense.attacks.fmn import fmn
from manifold_defense.attacks.norms import geometry
from manifold_defense.attacks.objective import correct
from manifold_defense.attacks.square import square
from manifold_defense.classifiers import ImageClassifier
from manifold_defense.evaluation.adapters import art_classifier, autoattack, foolbox_model
from manifold_defense.types import Attack, Norm
from pipelines.context import Context, Workshop
from pipelines.data import subset, to_float
from pipelines.settings import load_config
from pipelines.stages.classifiers import harden, train

EPS = 0.15
# By the name under which a peer is imported: that of its package.
PEERS = {
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
    "pyautoattack": "pyautoattack",
}
Contenders = dict[str, Callable[[int], Attack]]  # from a seed to an attack


def installed() -> dict[str, ModuleType]:
    """The peers that can be imported; one line for those that cannot."""
    peers = {}
    for name, package in PEERS.items():
        try:
            peers[name] = import_module(name)
        except ImportError as error:
            click.echo(f"{package} is left out: {error}", err=True)
    return peers


def classifiers(shop: Workshop) -> dict[str, nn.Module]:
    """The two classifiers of a run on the digits, trained by its stages and kept nowhere."""
    with tempfile.TemporaryDirectory() as root:
        standard, hardened = Path(root, "train-classifier"), Path(root, "harden")
        for work, folder, inputs in (
            (train, standard, {}),
            (harden, hardened, {"train-classifier": standard}),
        ):
            folder.mkdir()
            context = Context(shop, folder.name, folder, inputs)
            work(context)
            context.close()
        return {
            "hardened": load_classifier(hardened / "hardened").requires_grad_(False),
            "standard": load_classifier(standard).requires_grad_(False),
        }


def of_foolbox(attack: Any, eps: float | None = None) -> Attack:
    """An attack of foolbox; without `eps` it is one of minimum norm."""
    return lambda model, x, y: attack(foolbox_model(model), x, y, epsilons=eps)[1]


def of_art(kind: Any, **settings: Any) -> Attack:
    """An attack of ART, the whole batch at once."""

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        estimator = art_classifier(model, model.image_shape, model.classes)
        made = kind(estimator, batch_size=len(x), verbose=False, **settings)
        return torch.from_numpy(made.generate(x.numpy(), y.numpy()))

    return attack


def of_torchattacks(kind: Any, **settings: Any) -> Attack:
    return lambda model, x, y: kind(model, **settings)(x, y)


def our_suite(seed: int) -> list[Attack]:
    """What we would report at L∞, from cheap to dear; each meets what the ones before it left."""
    bound: dict[str, Any] = {"norm": "linf", "eps": EPS, "seed": seed}
    return [
        partial(pgd, **bound, steps=40, restarts=2, loss="both"),
        partial(apgd, **bound, steps=100, loss="ce"),
        partial(apgd, **bound, steps=100, loss="dlr", target_classes=9),
        partial(fab, **bound, steps=100, target_classes=4),
        partial(fmn, **bound, steps=100),
        partial(square, **bound, steps=5000),
    ]


def one_after_another(attacks: list[Attack]) -> Attack:
    """Each attack on the images that are still classified correctly."""

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x.clone()
        for one in attacks:
            with torch.no_grad():
                left = correct(model(x_adv), y).nonzero().squeeze(1)
            x_adv[left] = one(model, x[left], y[left])
        return x_adv

    return attack


def pgd40(peers: dict[str, ModuleType]) -> Contenders:
    step = 2.5 * EPS / 40
    contenders: Contenders = {"ours": lambda seed: partial(pgd, eps=EPS, steps=40, seed=seed)}
    if "foolbox" in peers:
        attack = peers["foolbox"].attacks.LinfPGD(abs_stepsize=step, steps=40)
        contenders["foolbox"] = lambda _: of_foolbox(attack, EPS)
    if "torchattacks" in peers:
        kind = peers["torchattacks"].PGD
        contenders["torchattacks"] = lambda _: of_torchattacks(kind, eps=EPS, alpha=step, steps=40)
    if "art" in peers:
        art = import_module("art.attacks.evasion").ProjectedGradientDescent
        contenders["art"] = lambda _: of_art(art, eps=EPS, eps_step=step, max_iter=40, num_random_init=1)
    return contenders


def apgd40(peers: dict[str, ModuleType], loss: str) -> Contenders:
    contenders: Contenders = {
        "ours": lambda seed: partial(apgd, norm="linf", eps=EPS, steps=40, loss=loss, seed=seed)
    }
    if "torchattacks" in peers:
        kind = peers["torchattacks"].APGD  # takes one gradient more than it is told
        contenders["torchattacks"] = lambda seed: of_torchattacks(
            kind, eps=EPS, steps=39, loss=loss, seed=seed
        )
    if "art" in peers:
        art = import_module("art.attacks.evasion").AutoProjectedGradientDescent
        name = {"ce": "cross_entropy", "dlr": "difference_logits_ratio"}[loss]
        contenders["art"] = lambda _: of_art(
            art, eps=EPS, eps_step=2 * EPS, max_iter=40, nb_random_init=1, loss_type=name
        )
    return contenders


def classes40(peers: dict[str, ModuleType]) -> Contenders:
    def divided(seed: int) -> Attack:
        of_eight = partial(pgd, eps=EPS, steps=8, seed=seed)
        return one_after_another([of_eight, partial(of_eight, target_classes=4)])

    contenders: Contenders = {
        "ours": lambda seed: partial(apgd, eps=EPS, steps=10, target_classes=4, seed=seed),
        "ours_pgd": lambda seed: partial(pgd, eps=EPS, steps=10, target_classes=4, seed=seed),
        "ours_divided": divided,
    }
    if "torchattacks" in peers:
        kind = peers["torchattacks"].APGDT  # takes one gradient more than it is told, and one class less
        contenders["torchattacks"] = lambda seed: of_torchattacks(
            kind, eps=EPS, steps=9, n_classes=5, seed=seed
        )
    return contenders


def ddn100(peers: dict[str, ModuleType]) -> Contenders:
    contenders: Contenders = {
        "ours": lambda _: partial(ddn, steps=100),
        "ours_fmn": lambda _: partial(fmn, norm="l2", steps=100),
    }
    if "foolbox" in peers:
        attacks = peers["foolbox"].attacks
        contenders["foolbox"] = lambda _: of_foolbox(attacks.DDNAttack(steps=100))
        # Its projection in L2 (3.3.4) divides a norm by itself and so does nothing: small steps serve
        # it best, and its distance says nothing about FMN.
        contenders["foolbox_fmn"] = lambda _: of_foolbox(attacks.L2FMNAttack(steps=100, max_stepsize=0.03))
    return contenders


def fab900(peers: dict[str, ModuleType]) -> Contenders:
    contenders: Contenders = {
        "ours": lambda seed: partial(fab, eps=EPS, steps=100, target_classes=9, seed=seed)
    }
    if "torchattacks" in peers:
        kind = peers["torchattacks"].FAB
        contenders["torchattacks"] = lambda seed: of_torchattacks(
            kind, norm="Linf", eps=EPS, steps=100, n_restarts=1, multi_targeted=True, n_classes=10, seed=seed
        )
    return contenders


def cw300(peers: dict[str, ModuleType]) -> Contenders:
    """Step sizes, constants and searches of the peers are among the best of a dozen settings each, tried
    on 64 of these images; ours keeps its defaults. torchattacks starts at infinity in tanh space
    where a pixel is exactly 0 or 1, and never moves it."""
    contenders: Contenders = {"ours": lambda _: partial(cw, steps=100, searches=3)}
    if "foolbox" in peers:
        attack = peers["foolbox"].attacks.L2CarliniWagnerAttack(
            binary_search_steps=3, steps=100, stepsize=0.1, initial_const=0.3
        )
        contenders["foolbox"] = lambda _: of_foolbox(attack)
    if "torchattacks" in peers:
        kind = peers["torchattacks"].CW
        contenders["torchattacks"] = lambda _: of_torchattacks(kind, c=1, steps=300, lr=0.1)
    if "art" in peers:
        art = import_module("art.attacks.evasion").CarliniL2Method
        # Two gradients each iteration: of the label's logit and of the other's.
        contenders["art"] = lambda _: of_art(
            art, binary_search_steps=5, max_iter=30, learning_rate=0.1, initial_const=1.0
        )
    return contenders


def suite(peers: dict[str, ModuleType]) -> Contenders:
    """AutoAttack as published, by the port and by the authors; and the port as shipped, of 10 steps."""
    contenders: Contenders = {"ours": lambda seed: one_after_another(our_suite(seed))}
    settings: dict[str, Any] = {"norm": "linf", "eps": EPS}
    if "torchattacks" in peers:
        contenders["autoattack"] = lambda seed: partial(
            autoattack, **settings, package="torchattacks", seed=seed
        )
        kind = peers["torchattacks"].AutoAttack
        contenders["autoattack_10"] = lambda seed: of_torchattacks(
            kind, norm="Linf", eps=EPS, n_classes=10, seed=seed
        )
    if "pyautoattack" in peers:
        contenders["autoattack_authors"] = lambda seed: partial(
            autoattack, **settings, package="pyautoattack", seed=seed
        )
    return contenders


@contextmanager
def counting() -> Iterator[dict[bool, int]]:
    """Counts the images that enter a classifier, with a gradient (True) and without."""
    counts = {True: 0, False: 0}

    def count(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, ImageClassifier):
            counts[torch.is_grad_enabled() and inputs[0].requires_grad] += len(inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


@torch.no_grad()
def broken(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, norm: Norm, eps: float) -> Tensor:
    """Which images (N,) an attack has fooled by the rules; those wrong from the start are."""
    fair = (x_adv >= 0).flatten(1).all(1) & (x_adv <= 1).flatten(1).all(1)
    fair &= geometry(norm).size(x_adv - x) <= eps * (1 + 1e-5)
    return ~correct(model(x), y) | (fair & ~correct(model(x_adv), y))


def distances(model: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
    """L2 distance (N,) of each image that was fooled, infinity of others, 0 of those wrong from the start."""
    with torch.no_grad():
        wrong = ~correct(model(x), y)
    size = geometry("l2").size(x_adv - x).where(broken(model, x, y, x_adv, "l2", math.inf), math.inf)
    return size.masked_fill(wrong, 0)


def compare(
    contenders: Contenders, model: nn.Module, x: Tensor, y: Tensor, seed: int, repeats: int, minimum: bool
) -> dict[str, dict[str, float | None]]:
    """By figure, then by contender: median L2 if `minimum`, else robust accuracy; speed and passes."""
    noted: dict[str, dict[str, list[float]]] = {}

    def note(figure: str, name: str, value: float) -> None:
        noted.setdefault(figure, {}).setdefault(name, []).append(value)

    for repeat in range(repeats):
        for name, make in contenders.items():
            torch.manual_seed(seed + repeat)
            np.random.seed(seed + repeat)  # ART draws from it
            attack = make(seed + repeat)
            with counting() as counts:
                started = time.process_time()
                x_adv = attack(model, x, y)
                seconds = time.process_time() - started
            if minimum:
                distance = distances(model, x, y, x_adv)
                note("median_l2", name, float(distance.median()))
                note("failures", name, float(distance.isinf().float().mean()))
            else:
                robust = ~broken(model, x, y, x_adv, "linf", EPS)
                note("robust_accuracy", name, float(robust.float().mean()))
            note("images_per_cpu_second", name, len(x) / seconds)
            note("seconds", name, seconds)
            note("gradient_passes", name, counts[True] / len(x))
            note("other_passes", name, counts[False] / len(x))

    def middle(figure: str, values: list[float]) -> float | None:
        timed = figure in ("images_per_cpu_second", "seconds")
        value = statistics.median(values) if timed else statistics.mean(values)
        return value if math.isfinite(value) else None  # JSON knows no infinity

    return {
        figure: {name: middle(figure, values) for name, values in of_all.items()}
        for figure, of_all in noted.items()
    }


def show(family: str, figures: dict[str, dict[str, float | None]]) -> None:
    """One table: a line for each contender, a column for each figure."""
    if not figures:
        return
    click.echo(f"  {family:<22}" + "".join(f"{figure:>23}" for figure in figures))
    for name in next(iter(figures.values())):
        values = [figures[figure][name] for figure in figures]
        cells = ("none" if value is None else f"{value:.4g}" for value in values)
        click.echo(f"    {name:<20}" + "".join(f"{cell:>23}" for cell in cells))


def versions(peers: dict[str, ModuleType]) -> dict[str, str]:
    return {name: version(name) for name in ("torch", *(PEERS[peer] for peer in peers))}


# What contends in each family, and whether its figure is a median distance instead of robust accuracy.
FAMILIES: dict[str, tuple[Callable[[dict[str, ModuleType]], Contenders], bool]] = {
    "pgd40": (pgd40, False),
    "apgd40": (partial(apgd40, loss="ce"), False),
    "apgd40_dlr": (partial(apgd40, loss="dlr"), False),
    "classes40": (classes40, False),
    "ddn100": (ddn100, True),
    "fab900": (fab900, False),
    "cw300": (cw300, True),
    "suite": (suite, False),
}


@benchmark(__doc__)
@click.option("--images", default=256, type=click.IntRange(min=2, max=500))
@click.option("--seed", default=0, type=click.IntRange(min=0))
@click.option("--repeats", default=3, type=click.IntRange(min=1))
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Default: all.")
@json_option
def main(images: int, seed: int, repeats: int, families: tuple[str, ...], output: Path | None) -> None:
    torch.set_num_threads(1)
    peers = installed()
    config = load_config(None, [f"seed={seed}"])
    shop = Workshop(config, Fabric(accelerator="cpu", devices=1), Console(quiet=True))
    test = subset(shop.data.test, images)
    x, y = to_float(test.images), test.labels
    facts: dict[str, Any] = {
        "images": images,
        "seed": seed,
        "repeats": repeats,
        "versions": versions(peers),
    }
    click.echo(f"{images} images of digits, {repeats} repeats, one thread; training two classifiers")
    for label, model in classifiers(shop).items():
        with torch.no_grad():
            clean = float(correct(model(x), y).float().mean())
        click.echo(f"{label}: clean accuracy {clean:.1%}")
        below = facts if label == "hardened" else facts.setdefault(label, {})
        below["clean_accuracy"] = clean
        for family in families or FAMILIES:
            contend, minimum = FAMILIES[family]
            # The suite takes as long as all else together; once will do.
            times = 1 if family == "suite" else repeats
            below[family] = compare(contend(peers), model, x, y, seed, times, minimum)
            show(family, below[family])
            if output is not None:
                output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
