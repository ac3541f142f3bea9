"""Purified files: pixels as `filter.project` gives them, every file accounted for, nothing half-written."""

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gan.networks import Encoder, Generator, NetworkConfig
from manifold_defense.filter import ManifoldFilter
from manifold_defense.projection import ProjectionConfig
from pipelines.data import to_float
from pipelines.locking import alone
from pipelines.purify import PurifyError, purify

SIZE = 8
NETWORKS = NetworkConfig(latent_dim=4, generator_width=4, critic_width=4, encoder_width=4)
TREE = ("a.png", "cat/b.PNG", "cat/deep/c.bmp", "dog/d.png", "e.png")


def make_filter(channels: int = 3, height: int = SIZE, width: int = SIZE) -> ManifoldFilter:
    torch.manual_seed(0)
    shape = (channels, height, width)
    return ManifoldFilter(Generator(shape, NETWORKS), Encoder(shape, NETWORKS), ProjectionConfig(steps=2))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For networks as small as these, threads cost more than they save; on busy cores tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rgb() -> ManifoldFilter:
    return make_filter()


def save(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """An image of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_tree(root: Path) -> Path:
    for seed, name in enumerate(TREE):
        save(root / name, seed)
    return root


def spoil(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")
    return path


def truncate(path: Path) -> Path:
    whole = save(path, size=(40, 40)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def pixels(path: Path) -> Tensor:
    """(C, H, W) uint8."""
    with Image.open(path) as image:
        array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def rounded(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def projected(filter: ManifoldFilter, image: Tensor) -> Tensor:
    """What the filter makes of one uint8 image (C, H, W), as uint8."""
    return rounded(filter.project(to_float(image[None])).image)[0]


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def contents(folder: Path) -> list[str]:
    """All files below, hidden ones too: a forgotten temporary file is seen."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def refused(filter: ManifoldFilter, source: Path, target: Path, **options: object) -> str:
    """The message of the refusal; it is one line."""
    with pytest.raises(PurifyError) as caught:
        purify(filter, source, target, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# A single image


@pytest.mark.parametrize("name", ["out.png", "out.BMP", "out.tif", "new/folder/out.tiff"])
def test_an_image_becomes_its_projection(rgb: ManifoldFilter, tmp_path: Path, name: str) -> None:
    source, progress = save(tmp_path / "in.png"), []
    done = purify(rgb, source, tmp_path / name, on_progress=lambda *counts: progress.append(counts))
    assert done[:3] == (1, tmp_path / name, ())
    assert done.error == pytest.approx(float(rgb.project(to_float(pixels(source)[None])).error))
    assert progress == [(1, 1)]
    result = pixels(tmp_path / name)
    assert torch.equal(result, projected(rgb, pixels(source)))
    assert not torch.equal(result, pixels(source))
    assert contents(tmp_path) == sorted(["in.png", name])


@pytest.mark.parametrize(
    ("target", "result"),
    [("folder", "folder/in.v1.png"), ("out", "out.png")],
    ids=["into a folder", "without a suffix"],
)
def test_an_image_becomes_png_unless_told_otherwise(
    rgb: ManifoldFilter, tmp_path: Path, target: str, result: str
) -> None:
    (tmp_path / "folder").mkdir()
    source = save(tmp_path / "in.v1.bmp")
    purify(rgb, source, tmp_path / target)
    assert contents(tmp_path) == sorted(["in.v1.bmp", result])
    assert torch.equal(pixels(tmp_path / result), projected(rgb, pixels(source)))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".gif", ".npy"])
def test_a_lossy_target_is_refused(rgb: ManifoldFilter, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"out{suffix}"
    message = refused(rgb, save(tmp_path / "in.png"), target)
    assert str(target) in message
    assert ".png, .bmp, .tif, .tiff" in message
    assert contents(tmp_path) == ["in.png"]


@pytest.mark.parametrize("damage", [spoil, truncate])
def test_a_single_corrupt_image_is_named_and_nothing_written(
    rgb: ManifoldFilter, tmp_path: Path, damage: object
) -> None:
    source = damage(tmp_path / "bad.png")  # type: ignore[operator]
    before = source.read_bytes()
    message = refused(rgb, source, tmp_path / "new" / "out.png")
    assert message.startswith(f"{source}: unreadable: ")
    assert os.listdir(tmp_path) == ["bad.png"]
    assert source.read_bytes() == before


def test_an_existing_file_is_overwritten_by_force_alone(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target = save(tmp_path / "in.png"), save(tmp_path / "out.png", seed=1)
    before = target.read_bytes()
    assert str(target) in refused(rgb, source, target)
    assert target.read_bytes() == before
    purify(rgb, source, target, force=True)
    assert torch.equal(pixels(target), projected(rgb, pixels(source)))


@pytest.mark.parametrize("target", ["in.png", "."], ids=["the file", "its folder"])
def test_an_image_is_not_written_over_itself(rgb: ManifoldFilter, tmp_path: Path, target: str) -> None:
    source = save(tmp_path / "in.png")
    before = source.read_bytes()
    assert "same file" in refused(rgb, source, tmp_path / target, force=True)
    assert source.read_bytes() == before


# Channels and sizes


def test_a_grey_image_of_another_size_is_fitted_to_an_rgb_filter(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", mode="L", size=(20, 13))
    purify(rgb, source, tmp_path / "out.png")
    with Image.open(source) as image:
        # The centre square: 13 of the 20 columns.
        box = (3.5, 0, 16.5, 13)
        fitted = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    expected = projected(rgb, torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
    assert torch.equal(pixels(tmp_path / "out.png"), expected)


def test_an_rgb_image_turns_grey_for_a_grey_filter(tmp_path: Path) -> None:
    filter, source = make_filter(channels=1), save(tmp_path / "in.png")
    purify(filter, source, tmp_path / "out.png")
    with Image.open(source) as image:
        grey = torch.from_numpy(np.array(image.convert("L")))[None]
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "L"
    assert torch.equal(pixels(tmp_path / "out.png"), projected(filter, grey))


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 8, 12)])
def test_a_filter_for_what_files_do_not_hold_is_refused(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    message = refused(make_filter(*shape), save(tmp_path / "in.png"), tmp_path / "out.png")
    assert "×".join(map(str, shape)) in message


# A folder


def test_a_tree_becomes_its_projections_and_a_table(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target, progress = save_tree(tmp_path / "in"), tmp_path / "new" / "out", []
    save(source / ".hidden.png")
    save(source / ".git" / "x.png")
    (source / "notes.txt").write_text("not an image")
    done = purify(rgb, source, target, on_progress=lambda *counts: progress.append(counts))

    names = sorted(TREE)
    results = [Path(name).with_suffix(".png").as_posix() for name in names]
    assert done[:3] == (len(TREE), target, ())
    assert progress == [(len(TREE), len(TREE))]
    assert contents(target) == sorted([*results, "errors.csv"])

    direct = rgb.project(to_float(torch.stack([pixels(source / name) for name in names])))
    for result, image in zip(results, rounded(direct.image), strict=True):
        assert torch.equal(pixels(target / result), image)
    header, *rows = table(target / "errors.csv")
    assert header == ["file", "error", "steps", "status"]
    assert [row[0] for row in rows] == names
    assert torch.equal(torch.tensor([float(row[1]) for row in rows]), direct.error)  # to the last bit
    assert done.error == pytest.approx(float(direct.error.mean()))
    assert [row[2:] for row in rows] == [["2", "ok"]] * len(names)


def test_batches_bound_what_is_projected_at_once_and_nothing_else(
    rgb: ManifoldFilter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, progress, sizes = save_tree(tmp_path / "in"), [], []
    purify(rgb, source, tmp_path / "whole")
    original = ManifoldFilter.project
    monkeypatch.setattr(ManifoldFilter, "project", lambda self, x: sizes.append(len(x)) or original(self, x))
    purify(rgb, source, tmp_path / "parts", batch_size=2, on_progress=lambda *counts: progress.append(counts))
    assert sizes == [2, 2, 1]
    assert progress == [(2, 5), (4, 5), (5, 5)]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    for name in contents(tmp_path / "whole"):
        if name.endswith(".png"):
            difference = pixels(tmp_path / "parts" / name).int() - pixels(tmp_path / "whole" / name).int()
            assert difference.abs().max() <= 1  # float rounding may tip a level


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_corrupt_files_are_named_and_the_rest_done(
    rgb: ManifoldFilter, tmp_path: Path, batch_size: int
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    truncate(source / "a" / "cut.png")
    truncate(source / "a" / "cut2.jpg")
    save(source / "b.png", seed=3)
    (source / "c.png").symlink_to("gone.png")
    spoil(source / "d.gif")
    save(source / "e.png", seed=4)
    done = purify(rgb, source, target, batch_size=batch_size)

    assert done.written == 2
    assert done.unreadable == ("a/cut.png", "a/cut2.jpg", "c.png", "d.gif")
    assert contents(target) == ["b.png", "e.png", "errors.csv"]
    for name in ("b.png", "e.png"):
        difference = pixels(target / name).int() - projected(rgb, pixels(source / name)).int()
        assert difference.abs().max() <= 1
    rows = {row[0]: row[1:] for row in table(target / "errors.csv")}
    assert list(rows) == ["file", "a/cut.png", "a/cut2.jpg", "b.png", "c.png", "d.gif", "e.png"]
    for name in done.unreadable:
        error, steps, status = rows[name]
        assert (error, steps) == ("", "")
        assert status.startswith("unreadable: ")
        assert len(status) > len("unreadable: ")
        assert str(tmp_path) not in status
    assert rows["b.png"][1:] == rows["e.png"][1:] == ["2", "ok"]


def test_a_folder_of_corrupt_files_alone_gives_a_table(rgb: ManifoldFilter, tmp_path: Path) -> None:
    spoil(tmp_path / "in" / "x.png")
    done = purify(rgb, tmp_path / "in", tmp_path / "out")
    assert done[:3] == (0, tmp_path / "out", ("x.png",))
    assert math.isnan(done.error)
    assert (tmp_path / "out" / "errors.csv").is_file()
    assert contents(tmp_path / "out") == ["errors.csv"]


def test_awkward_names_survive_the_table(rgb: ManifoldFilter, tmp_path: Path) -> None:
    names = ['comma, "quote".png', "line\nbreak.png", "ünï.png", os.fsdecode(b"\xff.png")]
    try:
        for name in names:
            save(tmp_path / "in" / name)
    except OSError:
        pytest.skip("the file system refuses such names")
    purify(rgb, tmp_path / "in", tmp_path / "out")
    with (tmp_path / "out" / "errors.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        assert sorted(row["file"] for row in csv.DictReader(file)) == sorted(names)
    assert contents(tmp_path / "out") == sorted([*names, "errors.csv"])


# What is refused, before any work


def test_a_missing_source_is_refused(rgb: ManifoldFilter, tmp_path: Path) -> None:
    assert str(tmp_path / "gone") in refused(rgb, tmp_path / "gone", tmp_path / "out")
    assert contents(tmp_path) == []


def test_a_folder_without_images_is_refused(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(source / ".hidden.png")
    (source / "notes.txt").write_text("not an image")
    message = refused(rgb, source, tmp_path / "out")
    assert message.startswith(f"{source}: no image file")
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_result_are_both_named(rgb: ManifoldFilter, tmp_path: Path) -> None:
    for name in ("sub/a.jpg", "sub/a.png", "a.png"):
        save(tmp_path / "in" / name)
    message = refused(rgb, tmp_path / "in", tmp_path / "out")
    assert "sub/a.jpg and sub/a.png would both become sub/a.png" in message
    assert not (tmp_path / "out").exists()


def test_a_result_in_the_place_of_a_folder_is_refused(rgb: ManifoldFilter, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.jpg")
    save(tmp_path / "in" / "a.png" / "b.png")
    message = refused(rgb, tmp_path / "in", tmp_path / "out")
    assert "a.jpg would become a.png, the folder of a.png/b.png" in message
    assert not (tmp_path / "out").exists()


def test_the_place_of_the_table_is_kept_free(rgb: ManifoldFilter, tmp_path: Path) -> None:
    save(tmp_path / "in" / "errors.csv" / "a.png")
    message = refused(rgb, tmp_path / "in", tmp_path / "out")
    assert "errors.csv/a.png would stand where the table errors.csv goes" in message
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_no_image(rgb: ManifoldFilter, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(rgb, tmp_path / "pipe", tmp_path / "out.png")


def test_a_folder_that_cannot_be_listed_is_named(
    rgb: ManifoldFilter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, listed = save_tree(tmp_path / "in"), os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    message = refused(rgb, source, tmp_path / "out")
    assert message == f"cannot read the folder {source / 'cat'}: Permission denied"


def test_linked_folders_are_followed_each_once(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(tmp_path / "elsewhere" / "b.png")
    save(source / "a.png")
    (source / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(source, target_is_directory=True)
    assert purify(rgb, source, tmp_path / "out").written == 2
    assert contents(tmp_path / "out") == ["a.png", "errors.csv", "linked/b.png"]


def test_a_folder_counts_before_links_to_it(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(source / "z" / "deep" / "b.png")
    (source / "a").symlink_to(source / "z", target_is_directory=True)
    (source / "m").mkdir()
    (source / "m" / "link").symlink_to(source / "z" / "deep", target_is_directory=True)
    purify(rgb, source, tmp_path / "out")
    assert contents(tmp_path / "out") == ["errors.csv", "z/deep/b.png"]


@pytest.mark.parametrize("target", ["in", "in/out", "in/../in/sub", "link/out", "."])
def test_input_and_output_folder_lie_apart(rgb: ManifoldFilter, tmp_path: Path, target: str) -> None:
    source = save_tree(tmp_path / "in")
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    before = contents(tmp_path)
    assert "must not contain one another" in refused(rgb, source, tmp_path / target, force=True)
    assert contents(tmp_path) == before


def test_a_name_that_begins_like_the_source_is_no_part_of_it(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source = save_tree(tmp_path / "in")
    assert purify(rgb, source, tmp_path / "in-purified").written == len(TREE)


def test_a_folder_is_not_written_to_a_file(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target = save_tree(tmp_path / "in"), save(tmp_path / "out.png")
    before = target.read_bytes()
    assert str(target) in refused(rgb, source, target, force=True)
    assert target.read_bytes() == before


def test_a_batch_holds_an_image_at_least(rgb: ManifoldFilter, tmp_path: Path) -> None:
    assert refused(rgb, save_tree(tmp_path / "in"), tmp_path / "out", batch_size=0).startswith("batch_size")


# What was there before, and what is there after a failure


def test_a_folder_that_is_not_empty_needs_force(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    save(source / "a.png")
    spoil(source / "bad.png")
    stale = [save(target / name, seed=9) for name in ("a.png", "bad.png", "other.png")]
    (target / "errors.csv").write_text("old")
    before = [path.read_bytes() for path in stale]
    assert str(target) in refused(rgb, source, target)
    assert [path.read_bytes() for path in stale] == before
    assert (target / "errors.csv").read_text() == "old"

    purify(rgb, source, target, force=True)
    # Nothing passes for the result of the unreadable file; what is none of ours stays.
    assert contents(target) == ["a.png", "errors.csv", "other.png"]
    assert torch.equal(pixels(target / "a.png"), projected(rgb, pixels(source / "a.png")))
    assert stale[2].read_bytes() == before[2]
    assert [row[0] for row in table(target / "errors.csv")] == ["file", "a.png", "bad.png"]


def test_two_commands_do_not_fill_one_folder(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target = save_tree(tmp_path / "in"), tmp_path / "out"
    target.mkdir()
    with alone(target, RuntimeError):
        assert f"{target}: another command is at work on it" in refused(rgb, source, target)
        assert contents(target) == []
    assert purify(rgb, source, target).written == len(TREE)


def test_a_link_leads_neither_into_what_is_written_nor_out_of_it(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target = save_tree(tmp_path / "in"), tmp_path / "out"
    target.mkdir()
    (target / "cat").symlink_to(source / "cat", target_is_directory=True)
    before = contents(tmp_path)
    assert "leads out of the output folder" in refused(rgb, source, target, force=True)
    assert contents(tmp_path) == before
    (target / "cat").unlink()
    assert purify(rgb, source, target, force=True).written == len(TREE)
    linked = source / "again.png"
    linked.symlink_to(next((target / "cat").glob("*.png")))
    assert "leads into the output folder" in refused(rgb, source, target, force=True)
    linked.unlink()
    (source / "more").symlink_to(target, target_is_directory=True)
    assert "leads into the output folder" in refused(rgb, source, target, force=True)


def test_what_a_killed_command_left_half_written_is_removed(rgb: ManifoldFilter, tmp_path: Path) -> None:
    (tmp_path / "out" / "cat").mkdir(parents=True)
    for name in (".123.partial", "cat/.45.partial", ".mine.partial", ".2024-notes.partial", ".1.a.partial"):
        (tmp_path / "out" / name).write_text("half")
    purify(rgb, save_tree(tmp_path / "in"), tmp_path / "out", force=True)
    hidden = sorted(path.name for path in (tmp_path / "out").rglob(".*"))
    assert hidden == [".1.a.partial", ".2024-notes.partial", ".mine.partial"]


def test_an_empty_folder_needs_no_force(rgb: ManifoldFilter, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert purify(rgb, save_tree(tmp_path / "in"), tmp_path / "out").written == len(TREE)


# Root may write anywhere, so a file stands where a folder should.
@pytest.mark.parametrize("source", ["in", "in/a.png"])
@pytest.mark.parametrize("target", ["file/out.png", "file/deep/out"])
def test_a_target_that_cannot_be_written_isone_line(
    rgb: ManifoldFilter, tmp_path: Path, source: str, target: str
) -> None:
    save_tree(tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    message = refused(rgb, tmp_path / source, tmp_path / target)
    assert message.startswith(f"{tmp_path / target}")
    assert "cannot be written: " in message
    assert (tmp_path / "file").read_text() == "mine"
    assert contents(tmp_path) == sorted(["file", *(f"in/{name}" for name in TREE)])


def test_a_failure_midway_leaves_whole_images_and_no_table(rgb: ManifoldFilter, tmp_path: Path) -> None:
    source, target = save_tree(tmp_path / "in"), tmp_path / "out"
    (target / "e.png").mkdir(parents=True)  # in the place of the last result
    (target / "errors.csv").write_text("old")
    message = refused(rgb, source, target, force=True)
    assert message.startswith(f"{target / 'e.png'}: cannot be written: ")
    assert contents(target) == ["a.png", "cat/b.png", "cat/deep/c.png", "dog/d.png"]


def test_an_interruption_leaves_whole_images_and_no_table(
    rgb: ManifoldFilter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = save_tree(tmp_path / "in"), tmp_path / "out"
    purify(rgb, source, tmp_path / "whole")
    whole = pixels(tmp_path / "whole" / "a.png")
    write = Image.Image.save

    def interrupted(self: Image.Image, path: Path, **options: str) -> None:
        write(self, path, **options)
        if (target / "a.png").exists():
            path.write_bytes(path.read_bytes()[:20])
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        purify(rgb, source, target)
    assert contents(target) == ["a.png"]
    assert torch.equal(pixels(target / "a.png"), whole)
