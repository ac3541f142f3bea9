"""The configuration of a run: dataclasses composed, which `pipelines.settings` reads and writes.

Defaults describe the `digits` run.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Discriminator, Tag

from gan.inversion import EncoderConfig
from gan.training import GanConfig
from manifold_defense.certification import SmoothingConfig
from manifold_defense.classifiers import ArchitectureConfig
from manifold_defense.evaluation import AttackConfig
from manifold_defense.evaluation.suites import QUICK, SUITES
from manifold_defense.hardening import OBJECTIVES, Objective, Pgd, Union
from manifold_defense.hardening.disturbance import Disturbance
from manifold_defense.hardening.training import TrainingConfig
from manifold_defense.projection import PRESETS, ProjectionConfig
from manifold_defense.types import Ball, Threat, View
from pipelines.data import DataConfig

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class FabricConfig:
    """Devices, processes and precision, as Lightning Fabric names them. Never part of a result's identity.

    accelerator  auto, cpu, cuda or mps
    devices      how many, or auto
    strategy     auto, ddp or another of Fabric's
    num_nodes    machines
    precision    32-true; bf16-mixed trains about twice as fast on hardware that has bfloat16; 16-mixed
    """

    __pydantic_config__: ClassVar = _STRICT

    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"


@dataclass(frozen=True)
class EncoderStageConfig(EncoderConfig):
    """The training of the encoder, and what its images suffer in it.

    body        the classifier that the encoder begins as: a variant of `harden`, or a folder (which a slash
                tells); joint: none, but as it was trained with the GAN, or is in a finished filter; auto:
                without a finished filter the first variant that is hardened for a threat, behind nothing, if
                none of the variants needs the filter; else joint
    classifier  whose answers the drawings are to keep, with an `agreement_weight`: a variant, a folder, or
                package.module:function of one of your own; "" for that of stage train-classifier
    share       what its answer to the drawing counts for beside that to the image, as in `evaluate.mixed`;
                1: all
    """

    body: str = "auto"
    classifier: str = ""
    share: float = 1.0
    disturbance: Disturbance = field(default_factory=Disturbance)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier and not self.agreement_weight:
            raise ValueError(
                f"classifier: expected none without an agreement_weight, got {self.classifier!r}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected in (0, 1], got {self.share}")
        if self.share < 1 and not self.agreement_weight:
            raise ValueError(f"share: expected 1 without an agreement_weight, got {self.share}")
        _check_pieces(self.disturbance, self.batch_size, "disturbance.pieces")

    @property
    def own_classifier(self) -> str:
        """`classifier` if it is one of the user's own, named as a function, or ""."""
        return self.classifier if ":" in self.classifier else ""

    @property
    def agrees(self) -> bool:
        return self.images > 0 and self.agreement_weight > 0


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier to defend, and its training on clean images."""

    __pydantic_config__: ClassVar = _STRICT

    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class ProjectStageConfig:
    """The stage `project`: how well test images are projected, clean and attacked with PGD.

    images  test images (0: all)
    threat  of the attack, which knows nothing of the filter
    """

    __pydantic_config__: ClassVar = _STRICT

    images: int = 0
    threat: Threat = field(default_factory=lambda: Threat("linf", 0.15))

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"images: expected at least 0 (all), got {self.images}")
        if self.threat.norm not in get_args(Ball):
            raise ValueError(
                f"threat.norm: expected one of {', '.join(get_args(Ball))}, got {self.threat.norm!r}"
            )


def _objective_name(value: Any) -> str:
    """Which objective a table describes; the default one if it does not say."""
    return str(value.get("name", Pgd.name) if isinstance(value, dict) else getattr(value, "name", ""))


if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = Annotated[
        reduce(or_, (Annotated[kind, Tag(kind.name)] for kind in OBJECTIVES)),
        Discriminator(
            _objective_name,
            custom_error_type="objective",
            custom_error_message="name: expected one of " + ", ".join(kind.name for kind in OBJECTIVES),
        ),
    ]

Preprocessing = Literal["binarise", "bit_depth", "jpeg", "blur", "noise"]
Baseline = Literal[Preprocessing, "nearest", "encoder"]


@dataclass(frozen=True)
class HardenConfig:
    """One variant of the classifier: how it is trained, starting from the clean one.

    name          of its folder and of its rows
    objective     what is made small, by `name` and with its own settings; see docs/hardening.md
    start         an earlier variant to start from, or the folder of a classifier (which a slash tells), in
                  place of the clean one
    architecture  of a network of its own, trained from scratch, in place of that of the clean classifier
    teacher       an earlier variant that distillation asks
    behind        filter: it is trained behind the filter; reconstructions: on G(z*) of the training images,
                  made once; or behind a preprocessing. There it stays
    view          of the filter that attacks of its training differentiate; it is judged through the exact one
    """

    __pydantic_config__: ClassVar = _STRICT

    name: str = "hardened"
    objective: ObjectiveConfig = field(default_factory=Pgd)
    start: str = ""
    architecture: ArchitectureConfig | None = None
    teacher: str = ""
    behind: Literal["", "filter", "reconstructions", Preprocessing] = ""
    view: View = "exact"
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(images=60_000))

    def __post_init__(self) -> None:
        if not self.name or set(self.name) - _NAME_LETTERS or self.name[0] in ".-":
            raise ValueError(f"name: expected letters, digits, dots, dashes, got {self.name!r}")
        if self.name in _NO_BODY:
            raise ValueError(
                f"name: {self.name} means something else as encoder.body; choose a different one"
            )
        if self.name in _SCRAPS or self.name.endswith(".partial"):
            raise ValueError(f"name: {self.name} is what a stage keeps beside its variants; choose another")
        if self.name in _TAKEN:
            raise ValueError(f"name: {self.name} is another row of the tables; choose a different one")
        if self.start and self.architecture:
            raise ValueError(f"architecture: a variant that starts from {self.start} has that of it")
        if self.teacher and not self.objective.takes_teacher:
            raise ValueError(f"teacher: objective {self.objective.name} asks none")
        if self.view != "exact" and self.behind != "filter":
            raise ValueError(
                f"view: expected exact for what is not trained behind the filter, got {self.view}"
            )
        if self.behind == "filter" and self.objective.name in _NOT_BEHIND_FILTER:
            raise ValueError(f"behind: {_NOT_BEHIND_FILTER[self.objective.name]}")
        if self.objective.name == "interval_bounds" and self.behind not in ("", *_MONOTONE):
            raise ValueError(f"behind: interval bounds follow none but {', '.join(_MONOTONE)}")
        if isinstance(self.objective, Union):
            pieces = "objective.disturbance.pieces"
            _check_pieces(self.objective.disturbance, self.training.batch_size, pieces)

    @property
    def projects(self) -> bool:
        """Whether it is trained on what the filter makes of images."""
        return self.behind in ("filter", "reconstructions")

    @property
    def needs_filter(self) -> bool:
        """Whether it needs at least the networks of the filter."""
        return self.objective.needs_manifold or self.projects


@dataclass(frozen=True)
class CertifyConfig:
    """What is proved of every classifier of the run.

    images             test images (0: all)
    methods            lipschitz and smoothing: L2; intervals: L∞; branching: L∞, behind binarise alone;
                       distance: L2, of a classifier of its own
    radii_l2           where certified accuracy is tabulated, and PGD tried against the proofs
    radii_linf         likewise
    smoothing          noise, draws and level of randomized smoothing, of classifiers bare and filtered
    bank               training images that the distance classifier keeps, the first of a stratified shuffle
    patches            affine patches that it makes of them for each class (0: the images themselves)
    directions         dimensions of a patch
    boxes              that branching may bound for an image and a radius
    """

    __pydantic_config__: ClassVar = _STRICT

    images: int = 50
    methods: tuple[Literal["lipschitz", "intervals", "branching", "smoothing", "distance"], ...] = (
        "lipschitz",
        "intervals",
        "smoothing",
        "distance",
    )
    radii_l2: tuple[float, ...] = (0.25, 0.5, 1.0)
    radii_linf: tuple[float, ...] = (0.02, 0.05, 0.15)
    smoothing: SmoothingConfig = field(default_factory=lambda: SmoothingConfig(draws=200, batch_size=200))
    bank: int = 2_000
    patches: int = 0
    directions: int = 8
    boxes: int = 2_000

    def __post_init__(self) -> None:
        least = {"images": 0, "patches": 0, "directions": 0, "bank": 1, "boxes": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {getattr(self, name)}")
        for name, most in (("radii_l2", 1e6), ("radii_linf", 1)):
            radii = getattr(self, name)
            if not radii or not all(0 < radius <= most for radius in radii):
                raise ValueError(
                    f"{name}: expected at least one radius, all above 0 and at most {most:,.0f}, got {radii}"
                )
        for name in ("methods", "radii_l2", "radii_linf"):
            if len({*getattr(self, name)}) < len(getattr(self, name)):
                raise ValueError(f"{name}: expected each of them once")


def _check_pieces(disturbance: Disturbance, batch_size: int, key: str) -> None:
    """A piece is one of another image."""
    if disturbance.pieces and batch_size < 2:
        raise ValueError(f"{key}: expected 0 in a batch of one image, got {disturbance.pieces}")


# Objectives that a filter cannot stand before, and why.
_NOT_BEHIND_FILTER = {
    "noise": "a filter takes images in [0, 1] alone, and this noise is not clipped",
    "gradient_penalty": "a filter's gradient cannot be differentiated again",
}
_MONOTONE = ("binarise", "bit_depth", "blur")
_NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "._-")
_TAKEN = ("undefended", "classifier", "distance", "filter", "own", *get_args(Baseline))
_SCRAPS = ("events", "jobs", "stage.json", "plan.json", "state.ckpt")  # in the folder of every stage
_NO_BODY = ("auto", "joint")  # of an encoder


def _one_or_more(value: Any) -> Any:
    """A single table stands for an array of one."""
    return [value] if isinstance(value, dict) else value


def _named_suite(value: Any) -> Any:
    """A name stands for the attacks of that suite."""
    return _named(value, SUITES, "a list of attacks")


def _named_preset(value: Any) -> Any:
    """A name stands for the settings of that preset."""
    return _named(value, PRESETS, "a table")


def _named(value: Any, known: Mapping[str, Any], otherwise: str) -> Any:
    if not isinstance(value, str):
        return value
    if value not in known:
        raise ValueError(f"expected {', '.join(known)} or {otherwise}, got {value!r}")
    return known[value]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured: every attack on every defence for every threat.

    images      test images (0: all)
    batch_size  of attacks; bounds memory
    mode        standard: an attack meets the images that the cheaper ones before it left; full: all
    baselines   preprocessing in front of the plain classifier, beside the filter
    mixed       share of what a hardened classifier, or your own, says of the drawing beside what it says of
                the image (0: no such defence)
    reject      share of clean images that the filter with a reject option may refuse (0: no such defence)
    random      further starts, drawn anew at every call, of a randomised filter (0: no such defence)
    checks      images on which the signs of masked gradients are looked for (0: none are)
    classifier  package.module:function of your own one, or its folder, in place of those of the run
    filter      folder of the filter to put in front of it; without, it stands beside baselines alone
    threats     by `norm` and `eps`
    attacks     a list of tables, or the name of a suite: quick, for a first look, or thorough, for figures
                that are to be quoted (`manifold_defense.evaluation.suites`)
    """

    __pydantic_config__: ClassVar = _STRICT

    images: int = 200
    batch_size: int = 250
    mode: Literal["standard", "full"] = "standard"
    threats: tuple[Threat, ...] = (Threat("linf", 0.15), Threat("l2", 1.0))
    baselines: tuple[Baseline, ...] = get_args(Baseline)
    mixed: float = 0.4
    reject: float = 0.05
    random: int = 0
    checks: int = 30
    classifier: str = ""
    filter: str = ""
    attacks: Annotated[tuple[AttackConfig, ...], BeforeValidator(_named_suite)] = QUICK

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("batch_size", 1), ("checks", 0), ("random", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("mixed", "reject"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected in [0, 1), got {getattr(self, name)}")
        if not self.threats or not self.attacks:
            raise ValueError("expected at least one threat and one attack")
        if self.filter and not self.classifier:
            raise ValueError("filter: goes in front of a classifier of your own; set classifier as well")
        for threat in self.threats:
            if not any(attack.applies_to(threat) and attack.name != "noise" for attack in self.attacks):
                raise ValueError(f"no attack but noise applies to the threat {threat.norm} {threat.eps:g}")
        for what, entries in (("threats", self.threats), ("baselines", self.baselines)):
            if len(set(entries)) < len(entries):
                raise ValueError(f"{what}: expected each of them once")
        labels = [attack.label for attack in self.attacks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two attacks are called {label}; rows could not tell them apart")


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on.

    run         its folder below runs/
    seed        of all draws
    filter      folder of a finished filter, instead of a GAN of the run's own; its encoder is trained on
                (encoder.images = 0: not at all)
    projection  a table, or the name of a preset: robust (also fast, single_shot), accurate, reference
    harden      variants of the classifier, a table each
    """

    __pydantic_config__: ClassVar = _STRICT

    run: str = "digits"
    seed: int = 0
    filter: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    encoder: EncoderStageConfig = field(default_factory=EncoderStageConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    projection: Annotated[ProjectionConfig, BeforeValidator(_named_preset)] = PRESETS["robust"]
    project: ProjectStageConfig = field(default_factory=ProjectStageConfig)
    harden: Annotated[tuple[HardenConfig, ...], BeforeValidator(_one_or_more)] = (HardenConfig(),)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    certify: CertifyConfig = field(default_factory=CertifyConfig)

    def __post_init__(self) -> None:
        plain = Path(self.run).name == self.run.strip() == self.run and self.run.isprintable()
        if not self.run or not plain or self.run.startswith("."):
            raise ValueError(f"run: expected a plain folder name, got {self.run!r}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: expected in [0, 2³¹), got {self.seed}")
        before: list[str] = []
        for variant in self.harden:
            if variant.name in before:
                raise ValueError(f"harden: two variants are called {variant.name}")
            for key, or_else in (("start", " or a folder such as ./mine"), ("teacher", "")):
                given = getattr(variant, key)
                if given not in ("", *before) and not (or_else and "/" in given):
                    raise ValueError(
                        f"harden.{variant.name}.{key}: expected a variant before it{or_else}, got {given!r}"
                    )
            if variant.view not in ("exact", *self.projection.views):
                raise ValueError(
                    f"harden.{variant.name}.view: expected one of {', '.join(self.projection.views)}, which "
                    f"such a projection has, got {variant.view}"
                )
            if variant.objective.name == "interval_bounds" and self._architecture(variant) == "resnet18":
                raise ValueError(
                    f"harden.{variant.name}: interval bounds follow a cnn or shallow, no resnet18"
                )
            before.append(variant.name)
        body, classifier = self.encoder.body, self.encoder.classifier
        own = self.encoder.own_classifier
        for key, name, others in (("body", body, _NO_BODY), ("classifier", classifier, ("", own))):
            if name in others or "/" in name:
                continue
            if name not in before:
                function = ", or package.module:function" if key == "classifier" else ""
                raise ValueError(
                    f"encoder.{key}: expected a variant of harden or a folder such as ./mine{function}, "
                    f"got {name!r}"
                )
            if self._need_the_filter:
                raise ValueError(
                    f"encoder.{key}: {name} would be trained before the encoder, but "
                    f"{self._need_the_filter[0]} needs the filter; expected a folder such as ./mine"
                )

    def _architecture(self, variant: HardenConfig) -> str:
        """What a variant is a network of; "" if that lies in a folder."""
        if "/" in variant.start:
            return ""
        if variant.start and not variant.architecture:
            return self._architecture(next(v for v in self.harden if v.name == variant.start))
        return (variant.architecture or self.classifier.architecture).name

    @property
    def encoder_body(self) -> str:
        """The variant or folder of the classifier that the encoder begins as, or "": see `encoder.body`."""
        if self.encoder.body not in _NO_BODY:
            return self.encoder.body
        if self.encoder.body == "joint" or self.filter or self._need_the_filter:
            return ""
        bare = (variant for variant in self.harden if variant.objective.threats and not variant.behind)
        return next((variant.name for variant in bare), "")

    @property
    def encoder_needs_variants(self) -> bool:
        named = (self.encoder_body, self.encoder.classifier)
        return any(name and "/" not in name for name in named if name != self.encoder.own_classifier)

    @property
    def _need_the_filter(self) -> list[str]:
        return [variant.name for variant in self.harden if variant.needs_filter]
