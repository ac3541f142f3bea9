"""Folders that hold a filter or a classifier: facts in JSON, weights in safetensors.

Loading needs torch and safetensors alone (a ResNet classifier needs torchvision as well), and
never unpickles anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gan.networks import Encoder, Generator, NetworkConfig
from manifold_defense.classifiers import ArchitectureConfig, ImageClassifier
from manifold_defense.filter import ManifoldFilter
from manifold_defense.projection import ProjectionConfig
from manifold_defense.types import Threat

VERSION = 1
# Encoders that folders keep: a network of its own, or one that began as a classifier (`encoder_from`).
OwnEncoder = Encoder | ImageClassifier
_Settings = TypeVar("_Settings")
_KINDS = {int: "a whole number", float: "a number", str: "text"}
FILTER, CLASSIFIER, GAN = "filter.json", "classifier.json", "gan.json"


class ArtifactError(ValueError):
    """A folder that is not what it should be; the message names the file and what was expected."""


def save_filter(filter: ManifoldFilter, folder: str | Path) -> None:
    """Write a filter made of our own networks; `load_filter` gives it back, in float32."""
    if type(filter) is not ManifoldFilter:
        raise ArtifactError(f"a folder holds a plain ManifoldFilter, got {type(filter).__name__}")
    facts, modules = _parts(filter.generator, filter.encoder)
    more = {"projection": asdict(filter.config), "trained": [asdict(threat) for threat in filter.trained]}
    _save(Path(folder), FILTER, {**facts, **more}, modules)


def load_filter(folder: str | Path) -> ManifoldFilter:
    """The filter of a folder written by `save_filter` or by `manifold-defense export`, on the CPU.

    The networks that `save_gan` or a training stage left make one with the default settings. Raises
    ArtifactError (a ValueError) that names the file if anything is missing or damaged.
    """
    path = _place(Path(folder), FILTER, "filter")
    if path is None and (Path(folder) / GAN).is_file():
        return ManifoldFilter(*load_gan(folder))
    path = path or _missing(folder, FILTER)
    facts, weights = _load(path, FILTER)
    generator, encoder = _networks(path / FILTER, facts, weights)
    try:
        config = _settings(ProjectionConfig, facts, "projection")
        return ManifoldFilter(generator, encoder, config, trained=_threats(facts))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path / FILTER}: bad settings: {_line(error)}") from None


def save_gan(generator: Generator, encoder: OwnEncoder | None, folder: str | Path) -> None:
    """Write a generator and, if there is one, its encoder."""
    _save(Path(folder), GAN, *_parts(generator, encoder))


def load_gan(folder: str | Path) -> tuple[Generator, OwnEncoder | None]:
    """Generator and encoder of a folder written by `save_gan`."""
    path = Path(folder)
    facts, weights = _load(path, GAN)
    return _networks(path / GAN, facts, weights)


def save_classifier(model: ImageClassifier, folder: str | Path, *, class_names: tuple[str, ...] = ()) -> None:
    """Write one of our classifiers; `load_classifier` gives it back, in float32."""
    facts = {
        "image_shape": list(model.image_shape),
        "classes": model.classes,
        "class_names": list(class_names),
        "architecture": asdict(model.config),
    }
    _save(Path(folder), CLASSIFIER, facts, {"classifier": model})


def load_classifier(folder: str | Path) -> ImageClassifier:
    """The classifier of a folder written by `save_classifier` or by a training stage, in eval mode.

    Raises ArtifactError (a ValueError) that names the file if anything is missing or damaged.
    """
    path = _place(Path(folder), CLASSIFIER, "classifier") or _missing(folder, CLASSIFIER)
    facts, weights = _load(path, CLASSIFIER)
    try:
        architecture = _settings(ArchitectureConfig, facts, "architecture")
        shape, classes = _shape(facts), _positive("classes", facts.get("classes"))
        with _undrawn():
            model = ImageClassifier(shape, classes, architecture)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArtifactError(f"{path / CLASSIFIER}: not a classifier description: {_line(error)}") from None
    _fill(model, weights, "classifier", path / CLASSIFIER)
    return model.eval()


def _parts(generator: nn.Module, encoder: nn.Module | None) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """The facts of a folder of networks, and the networks."""
    if not isinstance(generator, Generator):
        raise ArtifactError(
            f"only our own generators can be saved as a folder, got {type(generator).__name__}"
        )
    facts = {"image_shape": list(generator.image_shape), "network": asdict(generator.config)}
    if encoder is None:
        return facts, {"generator": generator}
    modules = {"generator": generator, "encoder": encoder}
    if isinstance(encoder, Encoder) and encoder.config == generator.config:
        return facts, modules
    if isinstance(encoder, ImageClassifier) and encoder.classes == generator.latent_dim:
        return {**facts, "encoder": asdict(encoder.config)}, modules
    raise ArtifactError(
        "only our own encoder, of the generator's NetworkConfig or from a classifier, can be saved with it"
    )


def _networks(
    source: Path, facts: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[Generator, OwnEncoder | None]:
    try:
        shape, config = _shape(facts), _settings(NetworkConfig, facts, "network")
        encoder: OwnEncoder | None = None
        with _undrawn():
            generator = Generator(shape, config)
            if "encoder" in facts:
                architecture = _settings(ArchitectureConfig, facts, "encoder")
                encoder = ImageClassifier(shape, config.latent_dim, architecture).eval()
            elif any(name.startswith("encoder.") for name in weights):
                encoder = Encoder(shape, config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArtifactError(f"{source}: not a description of networks: {_line(error)}") from None
    _fill(generator, weights, "generator", source)
    if encoder is not None:
        _fill(encoder, weights, "encoder", source)
    return generator, encoder


@contextmanager
def _undrawn() -> Iterator[None]:
    """Networks are made without weights: a folder's own come later, whatever it claims that they are."""
    with torch.inference_mode(False), torch.device("meta"):
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _settings(kind: Callable[..., _Settings], facts: dict[str, Any], key: str) -> _Settings:
    """The frozen dataclass `kind` of what the facts say at `key`; ValueError for a value of another type."""
    values = facts.get(key)
    if not isinstance(values, dict):
        raise ValueError(f"{key}: expected a table of settings, got {values!r}")
    usual = kind()
    for name, value in values.items():
        wanted = type(getattr(usual, name, value))
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits:
            raise ValueError(f"{key}.{name}: expected {_KINDS.get(wanted, wanted.__name__)}, got {value!r}")
    return kind(**values)


def _threats(facts: dict[str, Any]) -> tuple[Threat, ...]:
    """Those that an encoder was trained against; filters of long ago say nothing of them."""
    entries = facts.get("trained", [])
    if not isinstance(entries, list):
        raise ValueError(f"trained: expected a list of threats, got {entries!r}")
    return tuple(_settings(Threat, {"trained": entry}, "trained") for entry in entries)


def _shape(facts: dict[str, Any]) -> tuple[int, int, int]:
    value = facts.get("image_shape")
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"image_shape: expected three whole numbers, got {value!r}")
    c, h, w = (_positive("image_shape", side) for side in value)
    return c, h, w


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected whole numbers above 0, got {value!r}")
    return value


def _place(folder: Path, name: str, inside: str) -> Path | None:
    """`folder` itself, or the subfolder that an export keeps the thing in, whichever has it."""
    return next((path for path in (folder, folder / inside) if (path / name).is_file()), None)


def _missing(folder: str | Path, name: str) -> NoReturn:
    raise ArtifactError(f"{folder}: expected a folder with {name} in it")


def _save(folder: Path, name: str, facts: dict[str, Any], modules: dict[str, nn.Module]) -> None:
    """Weights first and facts last, each moved into place whole: a folder with facts is complete.

    Facts that lie there already go before the weights that they were of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{prefix}.{key}": value.detach().cpu().contiguous()
        for prefix, module in modules.items()
        for key, value in module.state_dict().items()
    }
    described, target = folder / name, (folder / name).with_suffix(".safetensors")
    partial, weighed = described.with_suffix(".json.partial"), target.with_suffix(".safetensors.partial")
    weighed.write_bytes(save(weights))  # `save_file` would let the owner alone read it, whatever the umask
    partial.write_text(json.dumps({"version": VERSION, **facts}, indent=2) + "\n", encoding="utf-8")
    described.unlink(missing_ok=True)
    os.replace(weighed, target)
    os.replace(partial, described)


def _load(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    source, weights = folder / name, (folder / name).with_suffix(".safetensors")
    try:
        facts = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: cannot be read: {error}") from None
    version = facts.get("version") if isinstance(facts, dict) else None
    if type(version) is not int or version != VERSION:
        raise ArtifactError(f"{source}: expected version {VERSION} of the format")
    try:
        return facts, load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{weights}: cannot be read: {error}") from None


def _fill(module: nn.Module, weights: dict[str, Tensor], prefix: str, source: Path) -> None:
    own = {key.removeprefix(prefix + "."): v for key, v in weights.items() if key.startswith(prefix + ".")}
    file = source.with_suffix(".safetensors")
    try:
        with torch.inference_mode(False):  # used outside of the caller's mode, too
            module.load_state_dict({key: value.to("meta") for key, value in own.items()})  # if it fits
            module.to_empty(device="cpu").load_state_dict(own)
    except RuntimeError as error:
        raise ArtifactError(f"{file}: weights do not fit: {_line(error)}") from None
    for key, value in module.state_dict().items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise ArtifactError(f"{file}: {prefix}.{key}: expected {value.dtype}, got {own[key].dtype}")
        # As they are loaded: what float64 can say may be infinite here.
        if value.is_floating_point() and not value.isfinite().all():
            raise ArtifactError(f"{file}: weights are not finite: {prefix}.{key}")
    if isinstance(module, ImageClassifier) and not (module.std > 0).all():
        raise ArtifactError(f"{file}: {prefix}.std: expected above 0")
