"""Pictures: what stands on them is what a user wrote, and no formula."""

import torch

from pipelines.board import Strip, save_figure, strips


def test_a_class_may_be_called_anything(tmp_path):
    rows = [Strip("attacked\n$", torch.rand(2, 1, 8, 8), [0, 1])]
    save_figure(strips(rows, [0, 0], ["$a_$", "übung $x^$"]), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
