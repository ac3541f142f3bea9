"""Folders of filters and classifiers: what comes back, and in which words damage is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gan import Encoder, Generator, NetworkConfig
from gan.optimisation import seeded
from manifold_defense import (
    PRESETS,
    ArtifactError,
    ManifoldFilter,
    ProjectionConfig,
    load_classifier,
    load_filter,
    save_classifier,
    save_filter,
)
from manifold_defense.artifact import load_gan, save_gan
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.encoders import encoder_from
from manifold_defense.randomised import RandomisedFilter

NETWORK = NetworkConfig(latent_dim=6, generator_width=4, critic_width=4, encoder_width=4, max_width=16)
SHAPES = [(1, 8, 8), (3, 32, 32)]


def make_filter(shape: tuple[int, int, int] = (1, 8, 8), *, encoder: bool = True) -> ManifoldFilter:
    generator = seeded(0, lambda: Generator(shape, NETWORK))
    inverse = seeded(1, lambda: Encoder(shape, NETWORK)) if encoder else None
    config = ProjectionConfig("lbfgs", "encoder" if encoder else "origin", restarts=2, steps=3, step_size=0.7)
    return ManifoldFilter(generator, inverse, config)


def make_classifier(name: Any = "cnn", shape: tuple[int, int, int] = (1, 8, 8)) -> ImageClassifier:
    """With normalisation and batch statistics that no default would give."""
    c = shape[0]
    model = seeded(
        0,
        lambda: ImageClassifier(
            shape,
            5,
            ArchitectureConfig(name, width=4),
            mean=torch.linspace(0.2, 0.4, c),
            std=torch.linspace(0.5, 0.3, c),
        ),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.1
                module.running_var *= 1.5
    return model.eval()  # type: ignore[return-value]


def images(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoder", [True, False])
def test_a_filter_comes_back(tmp_path: Path, shape: tuple[int, int, int], encoder: bool) -> None:
    filter, x = make_filter(shape, encoder=encoder), images(shape)
    save_filter(filter, tmp_path / "deep" / "folder")
    before = torch.get_rng_state()
    back = load_filter(str(tmp_path / "deep" / "folder"))
    assert torch.equal(before, torch.get_rng_state())
    assert back.config == filter.config
    assert (back.encoder is None) == (not encoder)
    assert torch.equal(back(x), filter(x))
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cnn", "shallow", "resnet18"])
def test_a_filter_whose_encoder_began_as_a_classifier_comes_back(
    tmp_path: Path, name: str, shape: tuple[int, int, int]
) -> None:
    generator = seeded(0, lambda: Generator(shape, NETWORK))
    encoder = encoder_from(make_classifier(name, shape), generator, samples=200)
    filter, x = ManifoldFilter(generator, encoder, PRESETS["robust"]), images(shape)
    save_filter(filter, tmp_path / "filter")
    save_gan(generator, encoder, tmp_path / "gan")
    for folder in ("filter", "gan"):
        back = load_filter(tmp_path / folder)
        assert torch.equal(back(x), filter(x))
        assert not any(module.training for module in back.modules())
    with pytest.raises(ArtifactError, match="from a classifier, can be saved"):
        save_gan(generator, make_classifier(name, shape), tmp_path / "logits")
    assert not (tmp_path / "logits").exists()
    facts = json.loads((tmp_path / "filter" / "filter.json").read_text())
    for damage in ("magic", {"name": "magic"}, {"width": 0}, {"name": name, "height": 3}):
        (tmp_path / "filter" / "filter.json").write_text(json.dumps({**facts, "encoder": damage}))
        with pytest.raises(ArtifactError, match=r"filter\.json: not a description of networks"):
            load_filter(tmp_path / "filter")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cnn", "shallow", "resnet18"])
def test_a_classifier_comes_back(tmp_path: Path, name: str, shape: tuple[int, int, int]) -> None:
    model, x = make_classifier(name, shape), images(shape)
    save_classifier(model.train(), tmp_path, class_names=("a", "b", "c", "d", "ë"))
    before = torch.get_rng_state()
    back = load_classifier(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert not back.training
    assert (back.image_shape, back.classes, back.config) == (shape, 5, model.config)
    with torch.no_grad():
        assert torch.equal(back(x), model.eval()(x))
    assert json.loads((tmp_path / "classifier.json").read_text("utf-8"))["class_names"][-1] == "ë"


def test_normalisation_is_the_first_layer() -> None:
    """Per channel, with the mean and deviation given: budgets stay in pixels."""
    model, x = make_classifier(shape=(3, 32, 32)), images((3, 32, 32))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.2, 0.3, 0.4], [0.5, 0.4, 0.3]))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.head(model.body((x - mean) / std)))


@pytest.mark.parametrize("encoder", [True, False])
def test_a_gan_comes_back(tmp_path: Path, encoder: bool) -> None:
    filter = make_filter(encoder=encoder)
    save_gan(filter.generator, filter.encoder, tmp_path)  # type: ignore[arg-type]
    generator, inverse = load_gan(tmp_path)
    z, x = torch.ones(2, 6), images((1, 8, 8))
    assert torch.equal(generator(z), filter.generator(z))
    assert (inverse is None) == (not encoder)
    if inverse is not None:
        assert torch.equal(inverse(x), filter.encoder(x))
    loaded = load_filter(tmp_path)  # as every recipe has it
    config = PRESETS["robust"] if encoder else ProjectionConfig(start="prior")
    assert loaded.config == config
    assert torch.equal(loaded(x), filter.configured(config)(x))


def test_an_encoder_of_another_width_is_refused_when_saved(tmp_path: Path) -> None:
    """A folder that cannot be loaded is no artifact."""
    encoder = seeded(1, lambda: Encoder((1, 8, 8), NetworkConfig(latent_dim=6, encoder_width=8)))
    with pytest.raises(ArtifactError, match="only our own encoder, of the generator's NetworkConfig"):
        save_filter(ManifoldFilter(make_filter().generator, encoder), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Foreign(nn.Module):
    latent_dim, image_shape = 6, (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(64, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x.flatten(1))


def test_foreign_networks_are_refused_when_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="only our own generators"):
        save_filter(ManifoldFilter(Foreign()), tmp_path)
    with pytest.raises(ArtifactError, match="only our own encoder"):
        save_filter(ManifoldFilter(make_filter().generator, Foreign()), tmp_path)
    with pytest.raises(ArtifactError, match="got RandomisedFilter"):
        save_filter(RandomisedFilter(make_filter(encoder=False)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["filter", "classifier"])
def test_the_parent_of_an_export_will_do(tmp_path: Path, kind: str) -> None:
    if kind == "filter":
        save_filter(make_filter(), tmp_path / "filter")
        assert load_filter(tmp_path).config == make_filter().config
    else:
        save_classifier(make_classifier(), tmp_path / "classifier")
        assert load_classifier(tmp_path).classes == 5


def test_an_export_beside_a_gan_is_the_filter(tmp_path: Path) -> None:
    filter = make_filter()
    save_gan(filter.generator, filter.encoder, tmp_path)  # type: ignore[arg-type]
    save_filter(filter.configured(ProjectionConfig(steps=3)), tmp_path / "filter")
    assert load_filter(tmp_path).config.steps == 3


def test_what_is_loaded_in_inference_mode_works_outside_of_it(tmp_path: Path) -> None:
    filter, x = make_filter().configured(ProjectionConfig(steps=2)), images((1, 8, 8))
    save_filter(filter, tmp_path)
    with torch.inference_mode():
        loaded = load_filter(tmp_path)
        assert torch.equal(loaded(x), filter(x))
    assert torch.equal(loaded(x), filter(x))
    (gradient,) = torch.autograd.grad(loaded(x.requires_grad_(True)).sum(), x)
    assert gradient.isfinite().all()


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_filter(make_filter(encoder=False), tmp_path)
    save_filter(make_filter(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filter.json", "filter.safetensors"]
    assert load_filter(tmp_path).encoder is not None


@pytest.mark.parametrize("moves", [0, 1])
def test_a_saving_that_is_cut_short_leaves_no_facts_of_other_weights(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_filter(make_filter(encoder=False), tmp_path)
    move, done = os.replace, []

    def cut_short(source: Any, target: Any) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_short)
        with pytest.raises(KeyboardInterrupt):
            save_filter(make_filter(), tmp_path)
    with pytest.raises(ArtifactError, match=r"expected a folder with filter\.json in it"):
        load_filter(tmp_path)
    save_filter(make_filter(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filter.json", "filter.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
def test_another_user_may_load_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_filter(make_filter(), tmp_path)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        "filter.json": "0o644",
        "filter.safetensors": "0o644",
    }


# --- Damage ---

Damage = Callable[[Path, Path], None]  # of (facts, weights)


def edit(**changes: Any) -> Damage:
    def damage(facts: Path, weights: Path) -> None:
        facts.write_text(json.dumps({**json.loads(facts.read_text()), **changes}))

    return damage


def drop(key: str) -> Damage:
    def damage(facts: Path, weights: Path) -> None:
        kept = json.loads(facts.read_text())
        del kept[key]
        facts.write_text(json.dumps(kept))

    return damage


def write(text: bytes) -> Damage:
    return lambda facts, weights: (facts.write_bytes(text), None)[1]


def cut(facts: Path, weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_header(facts: Path, weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:20])


def empty(facts: Path, weights: Path) -> None:
    weights.write_bytes(b"")


def no_weights(facts: Path, weights: Path) -> None:
    weights.unlink()


def folder_of_weights(facts: Path, weights: Path) -> None:
    weights.unlink()
    weights.mkdir()


def change(entry: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Damage:
    """Replace every tensor by `entry(name, tensor)`; None drops it."""

    def damage(facts: Path, weights: Path) -> None:
        changed = {key: entry(key, value) for key, value in load_file(weights).items()}
        save_file({key: value for key, value in changed.items() if value is not None}, weights)

    return damage


def poisoned(value: float) -> Damage:
    return change(lambda key, tensor: torch.full_like(tensor, value) if key.endswith("bias") else tensor)


ANY_KIND: dict[str, tuple[Damage, str]] = {
    "cut": (cut, "weights"),
    "cut-header": (cut_header, "weights"),
    "empty": (empty, "weights"),
    "no-weights": (no_weights, "weights"),
    "folder-of-weights": (folder_of_weights, "weights"),
    "nan": (poisoned(torch.nan), "weights"),
    "infinite": (poisoned(torch.inf), "weights"),
    "infinite-in-float32": (change(lambda key, v: v.double() * 1e300), "weights"),
    "whole-numbers": (change(lambda key, v: v.long()), "weights"),
    "a-tensor-missing": (change(lambda key, v: None if key.endswith("bias") else v), "weights"),
    "other-names": (change(lambda key, v: None), "weights"),
    "transposed": (change(lambda key, v: v.transpose(0, -1).contiguous() if v.dim() > 1 else v), "weights"),
    "version-2": (edit(version=2), "facts"),
    "version-true": (edit(version=True), "facts"),
    "version-1.0": (edit(version=1.0), "facts"),
    "version-none": (drop("version"), "facts"),
    "garbage": (write(b"\x00\x9f{garbage"), "facts"),
    "half-json": (write(b'{"version": 1,'), "facts"),
    "empty-json": (write(b""), "facts"),
    "a-list": (write(b"[1]"), "facts"),
    "a-deep-list": (write(b"[" * 100_000), "facts"),
    "shape-of-two": (edit(image_shape=[8, 8]), "facts"),
    "shape-of-words": (edit(image_shape=["a", "b", "c"]), "facts"),
    "shape-negative": (edit(image_shape=[-1, 8, 8]), "facts"),
    "shape-zero": (edit(image_shape=[0, 8, 8]), ""),  # either file may be blamed
    "shape-null": (edit(image_shape=None), "facts"),
    "no-shape": (drop("image_shape"), "facts"),
    "another-shape": (edit(image_shape=[1, 16, 16]), "weights"),
    "shape-beyond": (edit(image_shape=[1, 10**30, 8]), "facts"),
}
FILTER: dict[str, tuple[Damage, str]] = {
    "no-network": (drop("network"), "facts"),
    "unknown-network-key": (edit(network={"depth": 3}), "facts"),
    "latent-of-half": (edit(network={"latent_dim": 6.5}), "facts"),
    "latent-of-zero": (edit(network={"latent_dim": 0}), "facts"),
    "latents-beyond": (edit(network={"latent_dim": 10**30}), "facts"),
    "latents-of-a-terabyte": (edit(network={"latent_dim": 10**10}), "weights"),
    "key-of-two-lines": (edit(network={"a\nb": 3}), "facts"),
    "projection-key-of-two-lines": (edit(projection={"a\nb": 3}), "facts"),
    "threats-of-words": (edit(trained="linf"), "facts"),
    "a-threat-of-words": (edit(trained=["linf"]), "facts"),
    "an-unknown-threat": (edit(trained=[{"norm": "l7", "eps": 1.0}]), "facts"),
    "no-projection": (drop("projection"), "facts"),
    "projection-null": (edit(projection=None), "facts"),
    "seed-beyond": (edit(projection={"seed": 10**30, "start": "prior"}), "facts"),
    "true-for-steps": (edit(projection={"steps": True}), "facts"),
    "words-for-radius": (edit(projection={"radius": "wide"}), "facts"),
    "words-for-latents": (edit(network={"latent_dim": "six"}), "facts"),
    "unknown-solver": (edit(projection={"solver": "newton"}), "facts"),
    "unknown-projection-key": (edit(projection={"speed": 3}), "facts"),
    "half-a-step": (edit(projection={"steps": 2.5}), "facts"),
    "words-for-steps": (edit(projection={"steps": "many"}), "facts"),
}
CLASSIFIER: dict[str, tuple[Damage, str]] = {
    "no-architecture": (drop("architecture"), "facts"),
    "unknown-architecture": (edit(architecture={"name": "vit"}), "facts"),
    "half-a-width": (edit(architecture={"width": 4.5}), "facts"),
    "flat-images": (change(lambda key, v: 0 * v if key.endswith("std") else v), "weights"),
    "words-for-width": (edit(architecture={"width": "wide"}), "facts"),
    "classes-negative": (edit(classes=-3), "facts"),
    "classes-null": (edit(classes=None), "facts"),
    "classes-other": (edit(classes=7), "weights"),
    "classes-beyond": (edit(classes=10**30), "facts"),
    "width-of-a-terabyte": (edit(architecture={"width": 10**6}), "weights"),
}


@pytest.mark.parametrize(
    ("kind", "damage", "blamed"),
    [
        pytest.param(kind, *case, id=f"{kind}-{name}")
        for kind, table in (("filter", ANY_KIND | FILTER), ("classifier", ANY_KIND | CLASSIFIER))
        for name, case in table.items()
    ],
)
def test_damage_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, kind: str, damage: Damage, blamed: str
) -> None:
    if kind == "filter":
        save_filter(make_filter(), tmp_path)
    else:
        save_classifier(make_classifier(), tmp_path)
    facts, weights = tmp_path / f"{kind}.json", tmp_path / f"{kind}.safetensors"
    load = load_filter if kind == "filter" else load_classifier
    load(tmp_path)
    damage(facts, weights)
    with pytest.raises(ArtifactError) as error:
        load(tmp_path)
    message = str(error.value)
    blame = {"facts": [facts], "weights": [weights], "": [facts, weights]}[blamed]
    assert any(str(path) in message for path in blame)
    assert "\n" not in message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("load", "name"), [(load_filter, "filter.json"), (load_classifier, "classifier.json")]
)
@pytest.mark.parametrize("folder", ["", "missing", "file"])
def test_a_folder_without_facts_is_refused(tmp_path: Path, load: Any, name: str, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=name) as error:
        load(tmp_path / folder)
    assert str(tmp_path / folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_gan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gan\.json: cannot be read"):
        load_gan(tmp_path)
