"""Stage `certify`: what can be proved of each classifier, and whether any attack contradicts it.

N images. A line of the results is one method on one defence in one norm.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manifold_defense.artifact import load_classifier
from manifold_defense.attacks import pgd
from manifold_defense.certification import (
    Certificates,
    Clipped,
    branching_certificates,
    certified_accuracy,
    fit_patches,
    interval_certificates,
    lipschitz_certificates,
    smoothed_certify,
)
from manifold_defense.evaluation.baselines import Preprocessed
from manifold_defense.filter import DefendedClassifier
from manifold_defense.types import Ball
from pipelines.board import curves, save_figure
from pipelines.context import Context
from pipelines.data import subset, to_float
from pipelines.defences import PREPROCESSING, behind, load_parts
from pipelines.files import whole
from pipelines.stage import StageError

_CHUNK = 10  # images between two savings
_ATTACK_STEPS = 40


@dataclass(frozen=True)
class Proof:
    """`certify(x)` proves something of `defence`; `attacked` is what can be tried against it, if anything."""

    defence: str
    method: str
    norm: Ball
    certify: Callable[[Tensor], Certificates]
    attacked: nn.Module | None

    @property
    def name(self) -> str:
        return f"{self.defence}-{self.method}"


def run(context: Context) -> dict[str, Any]:
    config = context.config.certify
    x, y = context.test_images(config.images)
    proofs = list(_proofs(context))
    radii = {"l2": config.radii_l2, "linf": config.radii_linf}
    store = context.folder / "jobs"
    if context.main:
        store.mkdir(exist_ok=True)
    context.fabric.barrier()

    found: dict[str, Certificates] = {}
    lines = []
    with context.progress(len(proofs) * len(x)) as advance:
        for i, proof in enumerate(proofs):

            def report(done: int, before: int = i * len(x)) -> None:
                advance(before + done)

            certificates = _certify(context, proof, x, store, report)
            found[proof.name] = certificates
            lines.append(_line(context, proof, certificates, x, y, radii[proof.norm]))
    if context.main:
        _write_csv(context.folder / "images.csv", y, proofs, found)
        for norm in ("l2", "linf"):
            own = [proof for proof in proofs if proof.norm == norm]
            if own:
                figure = _curves(own, found, y, norm, max(radii[norm]))
                save_figure(figure, context.folder / f"certified-{norm}.png")
                context.board.add_figure(f"certified accuracy: {norm}", figure, 0)
    return {"n": len(x), "lines": lines}


def _proofs(context: Context) -> Iterator[Proof]:
    """What each method has to say of each classifier; one that it cannot follow is left out, and named."""
    config, seed = context.config.certify, context.config.seed
    filter, undefended = load_parts(context)
    classifiers: dict[str, nn.Module] = {"undefended": undefended}
    for variant in context.config.harden:
        model = load_classifier(context.inputs["harden"] / variant.name).requires_grad_(False)
        # What is deployed behind a preprocessing is proved behind it, the filter stands beside.
        place = variant.behind if variant.behind in PREPROCESSING else ""
        classifiers[variant.name] = behind(place, model.to(context.fabric.device), None)
    branching = partial(branching_certificates, radii=config.radii_linf, boxes=config.boxes)
    bounds: tuple[tuple[str, Ball, Callable[..., Certificates]], ...] = (
        ("lipschitz", "l2", lipschitz_certificates),
        ("intervals", "linf", interval_certificates),
        ("branching", "linf", branching),
    )
    for name, classifier in classifiers.items():
        for method, norm, certify in bounds:
            if method in config.methods and _follows(context, name, certify, classifier):
                yield Proof(name, method, norm, partial(certify, classifier), classifier)
        if "smoothing" in config.methods:
            # What is proved is the vote under noise; an attack on a single answer would say nothing of it.
            smooth = partial(smoothed_certify, config=config.smoothing, seed=seed)
            yield Proof(name, "smoothing", "l2", partial(smooth, classifier), None)
            if isinstance(classifier, Preprocessed):
                continue
            filtered = "filter" if name == "undefended" else f"{name}+filter"
            defended = Clipped(DefendedClassifier(filter, classifier))
            yield Proof(filtered, "smoothing", "l2", partial(smooth, defended), None)
    if "distance" in config.methods:
        classes = len(context.data.classes)
        if config.bank < classes:
            raise StageError(
                f"certify.bank: expected at least {classes}, one image of each class, got {config.bank}"
            )
        bank = subset(context.data.train, min(config.bank, len(context.data.train.labels)))
        patches = fit_patches(
            to_float(bank.images),
            bank.labels,
            patches=config.patches,
            directions=config.directions,
            seed=seed,
        ).to(context.fabric.device)
        yield Proof("distance", "distance", "l2", patches.certify, patches)


def _follows(
    context: Context, name: str, certify: Callable[..., Certificates], classifier: nn.Module
) -> bool:
    x, _ = context.test_images(1)
    try:
        certify(classifier, x[:0])  # looks at the classifier alone
    except TypeError as error:
        context.say(f"certify: {name} is left out: {error}")
        return False
    return True


def _certify(
    context: Context, proof: Proof, x: Tensor, store: Path, report: Callable[[int], None]
) -> Certificates:
    """Chunk by chunk, each kept as soon as it is done."""

    def work(chunk: int, images: slice) -> tuple[Tensor, ...]:
        path = store / f"{proof.name}-{chunk}.safetensors"
        try:
            found = Certificates(**load_file(path))
        except (FileNotFoundError, SafetensorError, TypeError):
            found = proof.certify(x[images])
            found = Certificates(
                found.prediction.cpu().contiguous(), found.radius.double().cpu().contiguous()
            )
            with whole(path) as partial:
                save_file(found._asdict(), partial)
        report(images.stop)
        return found

    return Certificates(*context.map_images(work, len(x), _CHUNK))


def _line(
    context: Context, proof: Proof, found: Certificates, x: Tensor, y: Tensor, radii: Sequence[float]
) -> dict[str, Any]:
    """Certified accuracy at each radius, what PGD leaves there, and the images on which the two disagree."""
    labels = y.cpu()
    line: dict[str, Any] = {
        "defence": proof.defence,
        "method": proof.method,
        "norm": proof.norm,
        "clean": float(certified_accuracy(found, labels, (0.0,))[0]),
        "median_radius": float(found.radius.median()),
        "certified": dict(
            zip(map(str, radii), certified_accuracy(found, labels, radii).tolist(), strict=True)
        ),
        "pgd": {},
        "contradicted": 0,
    }
    model = proof.attacked
    if model is None:
        return line
    broken = torch.zeros(len(y), dtype=torch.bool)
    for eps in radii:

        def attack(_: int, images: slice, eps: float = eps) -> tuple[Tensor, ...]:
            x_adv = pgd(
                model,
                x[images],
                y[images],
                norm=proof.norm,
                eps=eps,
                steps=_ATTACK_STEPS,
                loss="margin",
                seed=context.config.seed,
            )
            with torch.no_grad():
                return ((model(x_adv).argmax(1) != y[images]).cpu(),)

        (wrong,) = context.map_images(attack, len(x), 250)
        line["pgd"][str(eps)] = float((~wrong).double().mean())
        broken |= wrong & (found.prediction == labels) & (found.radius >= eps)
    return {**line, "contradicted": int(broken.sum())}


_COLUMNS = ("image", "label", "defence", "method", "norm", "prediction", "radius")


def _write_csv(path: Path, y: Tensor, proofs: Sequence[Proof], found: dict[str, Certificates]) -> None:
    """A row an image and proof; the prediction −1 is an abstention."""
    labels = y.tolist()
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for proof in proofs:
            rows = zip(labels, *(column.tolist() for column in found[proof.name]), strict=True)
            for i, (label, prediction, radius) in enumerate(rows):
                # In full: rounded to six places it could be more than is proved.
                writer.writerow((i, label, proof.defence, proof.method, proof.norm, prediction, radius))


def _curves(
    proofs: Sequence[Proof], found: dict[str, Certificates], y: Tensor, norm: str, most: float
) -> Any:
    radii = torch.linspace(0, 1.25 * most, 200).tolist()
    lines = {
        f"{proof.defence}, {proof.method}": certified_accuracy(found[proof.name], y.cpu(), radii).tolist()
        for proof in proofs
    }
    return curves(radii, lines, f"radius, {norm}", "certified accuracy")
