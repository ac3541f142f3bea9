"""Image data sets: read whole into memory as uint8, as float in [0, 1] at the boundary, augmented by batch.

Letters of shapes: N images, C channels, H rows, W columns.
"""

import hashlib
import logging
import os
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "image_folder")

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
# Data set: torchvision's class, the folder under the root that it reads, and the files that it expects there.
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", _IDX_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _IDX_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR_FILES),
}

_LARGE, _PIECE = 2**20, 2**16  # files of more bytes are looked at in pieces

_log = logging.getLogger(__name__)


class DataError(Exception):
    """The data cannot be used; the message is one line that says what to do about it."""


class NoImagesError(DataError):
    """No image file is where some were expected."""


@dataclass(frozen=True)
class DataConfig:
    """Which images to read and how training sees them. Raises `ValueError` for a value out of range.

    name          digits, mnist, fashion_mnist, cifar10 or image_folder
    root          torchvision's root, or the folder that holds train/CLASS/* and test/CLASS/*
    image_size    of image_folder alone: pixels a side, 64 at most
    channels      of image_folder alone: 1 grey, 3 RGB
    shift         classifiers are trained on images shifted at random by up to so many pixels
    flip          all training sees images flipped at random from left to right
    train_images  the first so many of a class-stratified shuffle (0: all)
    test_images   likewise
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = "digits"
    root: Path = Path("data")
    image_size: int = 32
    channels: int = 3
    shift: int = 0
    flip: bool = False
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        for key, valid, choices in (
            ("name", self.name in DATASETS, "one of " + ", ".join(DATASETS)),
            ("image_size", 8 <= self.image_size <= 64 and self.image_size % 2 == 0, "even and from 8 to 64"),
            ("channels", self.channels in (1, 3), "1 (grey) or 3 (RGB)"),
            ("shift", 0 <= self.shift < 64, "from 0 to 63"),
            ("train_images", self.train_images >= 0, "0 (all) or more"),
            ("test_images", self.test_images >= 0, "0 (all) or more"),
        ):
            if not valid:
                raise ValueError(f"{key} must be {choices}, not {getattr(self, key)!r}")


class ImageData(NamedTuple):
    """One split."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64, indices into the classes


@dataclass(frozen=True)
class Dataset:
    """Both splits, and what identifies them."""

    train: ImageData
    test: ImageData
    classes: tuple[str, ...]
    digest: str  # image_folder: of the names and contents of all its image files; else of the data set's name
    unreadable: tuple[str, ...] = ()  # files skipped as corrupt, relative to the root

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(config: DataConfig) -> Dataset:
    """Read both splits; the same config gives the same images in the same order.

    Raises `DataError` if files are missing or a folder's classes make no data set.
    """
    if config.name == "digits":
        data = _digits()
    elif config.name == "image_folder":
        data = _image_folder(config)
    else:
        data = _torchvision(config)
    side = min(data.image_shape[1:])
    if config.shift >= side:
        raise DataError(f"data.shift: expected less than the {side} pixels of a side, got {config.shift}")
    if 0 < config.train_images < len(data.classes):
        raise DataError(
            f"data.train_images: expected 0, for all, or at least {len(data.classes)}, one of each class, "
            f"got {config.train_images}"
        )
    return Dataset(
        train=subset(data.train, config.train_images),
        test=subset(data.test, config.test_images),
        classes=data.classes,
        digest=data.digest,
        unreadable=data.unreadable,
    )


def _root(config: DataConfig) -> Path:
    return Path(config.root).expanduser().absolute()  # in a program it may be text


def data_digest(config: DataConfig) -> str:
    """`Dataset.digest` without decoding an image."""
    if config.name != "image_folder":
        return _digest([config.name])
    root = _root(config)
    return _folder_digest(
        root,
        [p for s in ("train", "test") for c in _class_names(root / s) for p in image_files(root / s / c)],
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1], on their device."""
    return images.to(torch.float32) / 255


def augment(images: Tensor, config: DataConfig, rng: torch.Generator, *, shift: bool) -> Tensor:
    """Flip each image with probability 1/2 if `config.flip`; move it by up to `config.shift` if `shift`.

    images (N, C, H, W), on any device; uncovered pixels become 0. All randomness comes from `rng`, a CPU
    generator, so every device sees the same augmentation. Returns `images` itself if there is nothing to do.
    """
    n, channels, height, width = images.shape
    device = images.device
    if config.flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        images = torch.where(mirrored.to(device)[:, None, None, None], images.flip(-1), images)
    if shift and config.shift:
        offsets = torch.randint(-config.shift, config.shift + 1, (2, n, 1), generator=rng).to(device)
        rows = torch.arange(height, device=device) - offsets[0]  # (N, H): the source row of each row
        columns = torch.arange(width, device=device) - offsets[1]  # (N, W)
        images = images[
            torch.arange(n, device=device)[:, None, None, None],
            torch.arange(channels, device=device)[:, None, None],
            rows.clamp(0, height - 1)[:, None, :, None],
            columns.clamp(0, width - 1)[:, None, None, :],
        ]
        covered_rows = (rows >= 0) & (rows < height)
        covered_columns = (columns >= 0) & (columns < width)
        images = images * (covered_rows[:, None, :, None] & covered_columns[:, None, None, :])
    return images


def subset(data: ImageData, count: int) -> ImageData:
    """The first `count` images of a fixed shuffle whose every prefix is class-stratified; all if 0.

    Image i of the n of a class is placed at i/n of the way: a prefix holds the classes in proportion, and
    each at least once as soon as there is room. A smaller count gives a subset of a larger one.
    """
    if count == 0:
        return data
    chosen = _stratified(data.labels)[:count]
    return ImageData(data.images[chosen], data.labels[chosen])


def _stratified(own: Tensor) -> Tensor:
    """The order of `subset` for images of the labels `own` (N,)."""
    shuffled = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
    labels = own[shuffled]
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        members = labels == label
        size = int(members.sum())
        place[members] = torch.arange(size, dtype=torch.float64) / size
    return shuffled[place.argsort(stable=True)]


def split(data: ImageData, count: int) -> tuple[ImageData, ImageData]:
    """The first `count` images of the shuffle of `subset`, and all others in their own order.

    No class's only image is among the first.
    """
    order = _stratified(data.labels)
    alone = data.labels.bincount()[data.labels] == 1
    chosen = order[~alone[order]][:count]
    rest = torch.ones(len(data.labels), dtype=torch.bool)
    rest[chosen] = False
    return ImageData(data.images[chosen], data.labels[chosen]), ImageData(
        data.images[rest], data.labels[rest]
    )


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()[:12]


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _digits() -> Dataset:
    """The 1,797 images of 8x8 in scikit-learn, split 1,297 to 500; their 17 grey levels span 0..255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    indices = np.arange(len(labels))
    train, test = train_test_split(indices, test_size=500, stratify=digits.target, random_state=0)
    return Dataset(
        train=ImageData(images[train], labels[train]),
        test=ImageData(images[test], labels[test]),
        classes=tuple(str(name) for name in digits.target_names),
        digest=_digest(["digits"]),
    )


def _torchvision(config: DataConfig) -> Dataset:
    """Read the files under the root, or download them first."""
    import torchvision.datasets

    class_name, folder, files = _TORCHVISION[config.name]
    source: Any = getattr(torchvision.datasets, class_name)
    root = _root(config)
    target = root / folder

    def read(download: bool) -> Dataset:
        train, test = (source(str(root), train=split, download=download) for split in (True, False))
        return Dataset(
            train=_tensors(train),
            test=_tensors(test),
            classes=tuple(name.split(" - ")[0] for name in train.classes),  # MNIST's are "0 - zero" …
            digest=_digest([config.name]),
        )

    # Asked to download, torchvision reports even what it already has; so first ask without.
    try:
        return read(download=False)
    except Exception as error:
        found = in_one_line(error)
        created = [path for path in (target, *target.parents) if not os.path.exists(path)]  # deepest first
    try:
        return read(download=True)
    except Exception as error:
        for path in created:
            with suppress(OSError):  # not created after all, or no longer empty
                path.rmdir()
        complete = all(os.path.exists(target / file) for file in files)
        found = f"damaged ({found}), and no download mended it" if complete else "not found, nor downloaded"
        raise DataError(
            f"{config.name}: {found} ({in_one_line(error)}); put {', '.join(files)} into {target}"
        ) from error


def _tensors(source: Any) -> ImageData:
    """The images and labels of a torchvision data set: (N, H, W) tensors, or (N, H, W, C) arrays."""
    images = torch.as_tensor(source.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(source.targets, dtype=torch.int64)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    return ImageData(images, labels)


def _image_folder(config: DataConfig) -> Dataset:
    """Read ROOT/train/CLASS/** and ROOT/test/CLASS/**, no hidden files; sorted by class, then by name."""
    root = _root(config)
    classes, test_classes = _class_names(root / "train"), _class_names(root / "test")
    if len(classes) < 2:
        raise DataError(f"image_folder: fewer than 2 class folders in {root / 'train'}")
    if classes != test_classes:
        missing = ", ".join(sorted(set(classes) - set(test_classes))) or "none"
        extra = ", ".join(sorted(set(test_classes) - set(classes))) or "none"
        raise DataError(
            f"image_folder: {root / 'test'} must have the classes of train: missing {missing}; extra {extra}"
        )
    # List everything before decoding anything, so that an empty class is reported at once.
    files = {split: [image_files(root / split / name) for name in classes] for split in ("train", "test")}
    train, skipped_train = _decode_split(files["train"], root / "train", classes, config)
    test, skipped_test = _decode_split(files["test"], root / "test", classes, config)
    paths = [path for split in files.values() for members in split for path in members]
    skipped = skipped_train + skipped_test
    if skipped:
        _log.warning("%d of %d images in %s are unreadable; skipped", len(skipped), len(paths), root)
    return Dataset(
        train=train,
        test=test,
        classes=classes,
        digest=_folder_digest(root, paths),
        unreadable=tuple(path.relative_to(root).as_posix() for path in skipped),
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    except OSError as error:
        raise DataError(f"image_folder: cannot read the folder {folder}: {error.strerror}") from error


def image_files(folder: Path) -> list[Path]:
    """Every image file below a class folder, a dangling link too: it shall be named, not overlooked.

    Links to folders are followed, to each folder once, and come after what is there itself. Raises
    NoImagesError if there is none.
    """
    files = []
    seen: set[str] = set()
    waiting = [str(folder)]  # links come after all that is there itself
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=_unreadable_folder):
            place = os.path.realpath(parent)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = (os.path.join(parent, name) for name in folders)
            waiting += [path for path in paths if os.path.islink(path)]
            files += [
                Path(parent, name)
                for name in names
                if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
            ]
    files.sort()
    if not files:
        raise NoImagesError(f"image_folder: no image file ({' '.join(sorted(EXTENSIONS))}) in {folder}")
    return files


def _unreadable_folder(error: OSError) -> None:
    raise DataError(f"image_folder: cannot read the folder {error.filename}: {error.strerror}") from error


def _folder_digest(root: Path, paths: Sequence[Path]) -> str:
    """Of names and of what is in the files, so that they may be moved or copied, but not changed."""
    with ThreadPoolExecutor() as pool:
        gists = list(pool.map(_gist, paths))
    names = [path.relative_to(root).as_posix() for path in paths]
    return _digest(sorted(f"{name}\t{gist}" for name, gist in zip(names, gists, strict=True)))


def _gist(path: Path) -> str:
    """Size and checksum: of large files of both ends and the middle, which few changes leave as they are."""
    if not path.is_file():  # it is named where images are decoded
        return ""
    try:
        with path.open("rb") as file:
            size, checksum = file.seek(0, os.SEEK_END), 0
            large = (0, (size - _PIECE) // 2, size - _PIECE)
            for place in large if size > _LARGE else range(0, size, _PIECE):
                file.seek(place)
                checksum = zlib.crc32(file.read(_PIECE), checksum)
    except OSError:
        return ""
    return f"{size}\t{checksum}"


def _decode_split(
    files: Sequence[Sequence[Path]], folder: Path, classes: Sequence[str], config: DataConfig
) -> tuple[ImageData, list[Path]]:
    """Decode the files of each class in threads; corrupt ones are logged, left out, and returned beside."""
    from PIL import Image

    paths = [path for members in files for path in members]
    labels = torch.tensor([label for label, members in enumerate(files) for _ in members])
    images = torch.empty(len(paths), config.channels, config.image_size, config.image_size, dtype=torch.uint8)

    def decode(index: int) -> str | None:
        """Fill in one image, or return why not."""
        try:
            pixels = torch.from_numpy(decode_image(paths[index], config.channels, config.image_size))
        except Exception as error:  # corrupt bytes raise nearly anything: OSError, SyntaxError, struct.error
            return in_one_line(error)
        images[index] = pixels.permute(2, 0, 1)
        return None

    Image.init()  # Here, lest the threads race to load the decoders.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        warnings.simplefilter("ignore")  # Pillow remarks on odd metadata of images that it reads well.
        reasons = list(pool.map(decode, range(len(paths))))
    skipped = []
    for path, reason in zip(paths, reasons, strict=True):
        if reason is not None:
            _log.warning("unreadable image skipped: %s (%s)", path, reason)
            skipped.append(path)
    readable = torch.tensor([reason is None for reason in reasons])
    for name, count in zip(classes, labels[readable].bincount(minlength=len(classes)).tolist(), strict=True):
        if count == 0:
            raise DataError(f"image_folder: no readable image in {folder / name}")
    if skipped:
        images, labels = images[readable], labels[readable]
    return ImageData(images, labels), skipped


def decode_image(path: Path, channels: int, size: int) -> NDArray[np.uint8]:
    """One image (size, size, channels): upright, on black, centre square, resized with antialiasing.

    Of 16-bit grey the high byte is taken, of an animation the first frame. Raises for a truncated file.
    """
    from PIL import Image, ImageOps

    with Image.open(path, formats=_FORMATS) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.array(square, dtype=np.uint8).reshape(size, size, channels)
