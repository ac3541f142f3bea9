"""Data sets: what is loaded, what is refused and in which words, and what augmentation does to pixels."""

import logging
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.data import DataConfig, DataError, Dataset, augment, load_data, to_float

RED, GREY = (200, 30, 10), 90


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (9, 14), colour: object = RED) -> Path:
    """An image of one colour; a palette if the mode is P."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB" if mode == "P" else mode, size, colour)  # type: ignore[arg-type]
    (image.quantize(4) if mode == "P" else image).save(path)
    return path


def image_folder(root: Path) -> DataConfig:
    """Two classes, two images each in train and one in test."""
    for name in ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "train/dog/2.png"):
        save(root / name)
    for name in ("test/cat/1.png", "test/dog/1.png"):
        save(root / name)
    return DataConfig("image_folder", root, image_size=8)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The MNIST format: magic number (8: uint8; dimensions), big-endian sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(raw: Path) -> np.ndarray:
    """Six training and three test images; returns the training images."""
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    for split, count in (("train", 6), ("t10k", 3)):
        write_idx(raw / f"{split}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count) % 3)
    return images


def same(a: Dataset, b: Dataset) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.train, *a.test), (*b.train, *b.test), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("name", "imagenet", "digits, mnist, fashion_mnist, cifar10, image_folder"),
        ("image_size", 6, "even and from 8 to 64"),
        ("image_size", 33, "even and from 8 to 64"),
        ("image_size", 66, "even and from 8 to 64"),
        ("channels", 2, "1 (grey) or 3 (RGB)"),
        ("shift", -1, "from 0 to 63"),
        ("shift", 64, "from 0 to 63"),
        ("train_images", -1, "0 (all) or more"),
        ("test_images", -1, "0 (all) or more"),
    ],
)
def test_config_names_key_and_choices(key: str, value: object, choices: str) -> None:
    with pytest.raises(ValueError, match=key) as error:
        DataConfig(**{key: value})  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith(key)
    assert choices in message
    assert repr(value) in message
    assert "\n" not in message


def test_config_is_strict_under_pydantic() -> None:
    adapter = pytest.importorskip("pydantic").TypeAdapter(DataConfig)
    assert adapter.validate_python({"root": "here"}) == DataConfig(root=Path("here"))
    for wrong in ({"nmae": "digits"}, {"channels": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            adapter.validate_python(wrong)


def test_digits() -> None:
    data = load_data(DataConfig())
    assert data.train.images.shape == (1297, 1, 8, 8)
    assert data.test.images.shape == (500, 1, 8, 8)
    assert data.image_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert sorted(set(data.train.images.flatten().tolist())) == [round(v * 255 / 16) for v in range(17)]
    train, test = (split.labels.bincount() for split in (data.train, data.test))
    torch.testing.assert_close(train / 1297, test / 500, atol=0.002, rtol=0)
    seen = {image.numpy().tobytes() for image in data.train.images}
    assert not any(image.numpy().tobytes() in seen for image in data.test.images)
    again = load_data(DataConfig())
    assert same(data, again)
    assert data.digest == again.digest


def test_to_float_is_exact_at_the_ends() -> None:
    values = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.tensor([0, 0.2, 1]))


@pytest.mark.parametrize("count", [10, 37, 300])
def test_limit_is_stratified_and_nested(count: int) -> None:
    whole = load_data(DataConfig())
    data = load_data(DataConfig(train_images=count, test_images=10))
    expected = count * whole.train.labels.bincount() / 1297
    assert len(data.train.images) == count
    assert ((data.train.labels.bincount() - expected).abs() <= 1).all()
    assert sorted(data.test.labels.tolist()) == list(range(10))
    more = load_data(DataConfig(train_images=count + 5))
    assert torch.equal(more.train.images[:count], data.train.images)
    assert torch.equal(more.train.labels[:count], data.train.labels)
    labels = {image.numpy().tobytes(): label for image, label in zip(*whole.train, strict=True)}
    assert all(labels[i.numpy().tobytes()] == label for i, label in zip(*data.train, strict=True))


@pytest.mark.parametrize(("count", "expected"), [(3, [1, 1, 1]), (20, [17, 2, 1]), (100, [90, 9, 1])])
def test_limit_keeps_proportions_and_rare_classes(tmp_path: Path, count: int, expected: list[int]) -> None:
    raw = tmp_path / "MNIST/raw"
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", np.zeros((100, 28, 28)))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.repeat([0, 1, 2], [90, 9, 1]))
    data = load_data(DataConfig("mnist", tmp_path, test_images=count))
    assert data.test.labels.bincount().tolist() == expected
    assert len(data.train.labels) == 100


def test_limit_beyond_the_data_is_all_of_it() -> None:
    assert len(load_data(DataConfig(train_images=9999)).train.images) == 1297


@pytest.mark.parametrize(
    ("name", "mode", "colour", "rgb"),
    [
        ("a.png", "RGB", RED, RED),
        ("a.bmp", "RGB", RED, RED),
        ("a.gif", "P", RED, RED),
        ("a.png", "P", RED, RED),
        ("deep/er/a.PNG", "RGB", RED, RED),
        ("a.png", "RGBA", (255, 100, 0, 51), (51, 20, 0)),  # a fifth of it, on black
        ("a.png", "LA", (255, 0), (0, 0, 0)),
        ("a.TIFF", "L", GREY, (GREY,) * 3),
        ("a.png", "1", 1, (255,) * 3),
        ("a.png", "I;16", GREY * 256 + 7, (GREY,) * 3),
        ("a.JPeG", "L", GREY, (GREY,) * 3),
        ("a.webp", "RGB", (255,) * 3, (255,) * 3),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder_reads(
    tmp_path: Path, name: str, mode: str, colour: object, rgb: tuple[int, int, int], channels: int
) -> None:
    config = image_folder(tmp_path)
    save(tmp_path / "train/ape" / name, mode, colour=colour)
    save(tmp_path / "test/ape/1.png")
    data = load_data(DataConfig("image_folder", tmp_path, config.image_size, channels))
    assert data.classes == ("ape", "cat", "dog")
    assert data.image_shape == (channels, 8, 8)
    assert data.train.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [0, 1, 2]
    grey = Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0))
    expected = torch.tensor([grey] if channels == 1 else rgb)[:, None, None].expand(channels, 8, 8)
    torch.testing.assert_close(data.train.images[0], expected.to(torch.uint8), atol=1, rtol=0)
    assert data.unreadable == ()
    assert data.train.images.dtype == torch.uint8


def test_image_folder_keeps_pixels_of_the_right_size(tmp_path: Path) -> None:
    config = image_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train/cat/1.png")
    assert np.array_equal(load_data(config).train.images[0].permute(1, 2, 0).numpy(), pixels)


def test_image_folder_crops_the_centre_with_antialiasing(tmp_path: Path) -> None:
    config = image_folder(tmp_path)
    pixels = np.zeros((64, 192), np.uint8)
    pixels[:, 64:128] = 255 * (np.indices((64, 64)).sum(0) % 2)  # in the middle: a checkerboard, half grey
    Image.fromarray(pixels).save(tmp_path / "train/cat/1.png")
    image = load_data(config).train.images[0].int()
    assert (image[..., 1:-1] - 128).abs().max() <= 2
    assert (image - 128).abs().max() <= 16  # the filter reaches a little over the edge of the crop


def test_image_folder_turns_upright(tmp_path: Path) -> None:
    config = image_folder(tmp_path)
    image = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 4, axis=0).repeat(8, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    image.save(tmp_path / "train/cat/1.png", exif=exif)
    assert load_data(config).train.images[0, 0, :, 0].tolist() == [255] * 4 + [0] * 4


def test_image_folder_is_deterministic_and_its_digest_follows_the_files(tmp_path: Path) -> None:
    config = image_folder(tmp_path)
    first = load_data(config)
    for ignored in ("train/cat/.hidden.png", "train/.git/1.png", "train/cat/.old/1.png", "train/loose.png"):
        save(tmp_path / ignored)
    (tmp_path / "train/cat/notes.txt").write_text("not an image, and not called one")
    again = load_data(config)
    assert same(first, again)
    assert first.digest == again.digest
    assert len(first.digest) == 12
    save(tmp_path / "train/cat/3.png")
    assert load_data(config).digest != first.digest
    (tmp_path / "train/cat/3.png").unlink()
    save(tmp_path / "train/cat/2.png", size=(90, 140))
    assert load_data(config).digest != first.digest


@pytest.mark.parametrize("pixel", [(0, 0), (70, 30), (99, 99)])
def test_the_digest_of_a_folder_sees_an_image_of_the_same_size(
    tmp_path: Path, pixel: tuple[int, int]
) -> None:
    """Of a format that does not compress, all images of one size have as many bytes."""
    config = image_folder(tmp_path)
    path = tmp_path / "train/cat/9.bmp"
    image = Image.new("RGB", (100, 100))
    image.save(path)
    before, size = load_data(config).digest, path.stat().st_size
    image.putpixel(pixel, (255, 0, 0))
    image.save(path)
    assert path.stat().st_size == size
    assert load_data(config).digest != before
    image.putpixel(pixel, (0, 0, 0))
    image.save(path)  # at another time: copies are the same
    assert load_data(config).digest == before


def test_unreadable_images_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = image_folder(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in ("train/cat/cut.png", "train/cat/cut.jpg", "test/dog/cut.webp"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/dog/text.png").write_text("not an image")
    (tmp_path / "train/dog/empty.gif").touch()
    (tmp_path / "train/dog/dangling.png").symlink_to("nowhere.png")
    Image.new("F", (9, 9)).save(tmp_path / "train/dog/z.tif")
    with caplog.at_level(logging.WARNING, "pipelines.data"):
        data = load_data(config)
    names = [f"cat/{n}" for n in ("cut.jpg", "cut.png")]
    names += [f"dog/{n}" for n in ("dangling.png", "empty.gif", "text.png", "z.tif")]
    assert data.unreadable == (*(f"train/{name}" for name in names), "test/dog/cut.webp")
    *lines, total = (record.getMessage() for record in caplog.records)
    for line, name in zip(lines, data.unreadable, strict=True):
        assert line.startswith(f"unreadable image skipped: {tmp_path / name} (")
        assert "\n" not in line
    assert total.startswith("7 of 13 images")
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.test.labels.tolist() == [0, 1]
    assert (data.train.images == torch.tensor(RED)[:, None, None]).all()


@pytest.mark.parametrize(
    ("removed", "added", "words"),
    [
        ("train/cat/*", None, ["no image file", "train/cat"]),
        ("test/cat/*", "test/cat/.hidden.png", ["no image file", "test/cat"]),
        ("test", None, ["cannot read", "test"]),
        ("train", None, ["cannot read", "train"]),
        ("*/dog", None, ["fewer than 2", "train"]),
        ("test/dog", None, ["test", "missing dog;", "extra none"]),
        ("none", "test/ape/1.png", ["test", "missing none;", "extra ape"]),
    ],
)
def test_image_folder_refuses(tmp_path: Path, removed: str, added: str | None, words: list[str]) -> None:
    config = image_folder(tmp_path / "pets")
    for path in sorted(config.root.glob(removed)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if added:
        save(config.root / added)
    with pytest.raises(DataError) as error:
        load_data(config)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (str(config.root), *words))


def test_image_folder_refuses_a_class_of_unreadable_images(tmp_path: Path) -> None:
    config = image_folder(tmp_path)
    (tmp_path / "test/dog/1.png").write_text("not an image")
    with pytest.raises(DataError, match=r"^image_folder: no readable image in .*test/dog$"):
        load_data(config)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_from_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, folder: str) -> None:
    images = write_mnist(tmp_path / folder / "raw")
    data = load_data(DataConfig(name, tmp_path))
    assert torch.equal(data.train.images, torch.from_numpy(images).to(torch.uint8)[:, None])
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.images.shape == (3, 1, 28, 28)
    assert len(data.classes) == 10
    assert data.classes[0] in ("0", "T-shirt/top")
    assert capfd.readouterr() == ("", "")


def test_cifar10_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the checksums
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3 * 32 * 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = load_data(DataConfig("cifar10", tmp_path))
    assert np.array_equal(data.test.images.numpy(), pixels.reshape(2, 3, 32, 32))
    assert data.train.labels.tolist() == [3, 9] * 5
    assert data.classes == tuple("abcdefghij")


def offline(*_: object, **__: object) -> None:
    raise RuntimeError("Error downloading:\nno network")


@pytest.mark.parametrize(
    ("name", "module", "folder", "file"),
    [
        ("mnist", "mnist", "MNIST/raw", "t10k-labels-idx1-ubyte"),
        ("fashion_mnist", "mnist", "FashionMNIST/raw", "train-images-idx3-ubyte"),
        ("cifar10", "cifar", "cifar-10-batches-py", "data_batch_3"),
    ],
)
def test_missing_files_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, folder: str, file: str
) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load_data(DataConfig(name, Path("data")))
    message = str(error.value)
    assert str(tmp_path / "data" / folder) in message
    assert file in message
    assert "no network" in message
    assert message.startswith(f"{name}: not found")
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []  # the folders made for the download are gone


@pytest.mark.parametrize("blocked", ["root", "folder"])
def test_unwritable_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str) -> None:
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    root = tmp_path / "data"
    file = root if blocked == "root" else root / "MNIST"  # a file where a folder has to be made
    file.parent.mkdir(exist_ok=True)
    file.write_text("kept")
    with pytest.raises(DataError, match="MNIST/raw"):
        load_data(DataConfig("mnist", root))
    assert file.read_text() == "kept"


@pytest.mark.parametrize("damage", ["cut", "fewer labels"])
def test_damaged_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    write_mnist(tmp_path / "MNIST/raw")
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    if damage == "cut":
        labels.write_bytes(labels.read_bytes()[:-1])
    else:
        write_idx(labels, np.arange(5))
    why = {"cut": "bytes|size|shape|Error", "fewer labels": "images but 5 labels"}[damage]
    with pytest.raises(DataError, match=rf"^mnist: damaged \(.*({why}).*\), and no .* into .*MNIST/raw$"):
        load_data(DataConfig("mnist", tmp_path))
    assert labels.exists()


def ramp(n: int = 64, height: int = 5, width: int = 7) -> Tensor:
    """(N, 2, H, W), every pixel of an image different and none 0."""
    pixels = torch.arange(1, 2 * height * width + 1, dtype=torch.float32) / 100
    return pixels.reshape(1, 2, height, width).expand(n, -1, -1, -1)


def moved(image: Tensor, dy: int, dx: int) -> Tensor:
    """The oracle: slices of (C, H, W), zero elsewhere."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    result[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = image[
        :, max(-dy, 0) : height + min(-dy, 0), max(-dx, 0) : width + min(-dx, 0)
    ]
    return result


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shift_is_an_exact_move_with_zeros() -> None:
    images = ramp(400)
    shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    candidates = torch.stack([moved(images[0], *shift) for shift in shifts])
    result = augment(images, DataConfig(shift=2), rng(), shift=True)
    matches = (result[:, None] == candidates).flatten(2).all(2)  # (N, 25)
    assert (matches.sum(1) == 1).all()
    assert matches.any(0).all()


def test_flip_is_exact_and_strikes_about_half() -> None:
    images = ramp(400)
    result = augment(images, DataConfig(flip=True), rng(), shift=False)
    flipped = (result == images.flip(-1)).flatten(1).all(1)
    kept = (result == images).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 150 < int(flipped.sum()) < 250


@pytest.mark.parametrize(
    ("config", "shift"),
    [(DataConfig(shift=2), False), (DataConfig(shift=0), True), (DataConfig(), True)],
)
def test_nothing_to_do_leaves_the_images(config: DataConfig, shift: bool) -> None:
    assert torch.equal(augment(ramp(), config, rng(), shift=shift), ramp())


def test_augment_is_deterministic_by_rng_and_leaves_its_input() -> None:
    config, images = DataConfig(shift=2, flip=True), ramp().clone()
    first = augment(images, config, rng(1), shift=True)
    assert torch.equal(first, augment(images, config, rng(1), shift=True))
    assert not torch.equal(first, augment(images, config, rng(2), shift=True))
    assert torch.equal(images, ramp())
    assert first.dtype == torch.float32


def test_shift_beyond_the_image_is_black() -> None:
    assert augment(ramp(), DataConfig(shift=63), rng(), shift=True).count_nonzero() < 70


def test_a_shift_out_of_the_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"^data\.shift: expected less than the 8 pixels of a side, got 8$"):
        load_data(DataConfig(shift=8))


def test_fewer_training_images_than_classes_are_refused() -> None:
    assert set(load_data(DataConfig(train_images=10)).train.labels.tolist()) == set(range(10))
    with pytest.raises(DataError, match=r"train_images: expected 0, for all, or at least 10, one of each"):
        load_data(DataConfig(train_images=9))
