"""Which images a step sees: every image once an epoch, ranks apart, and nothing but (seed, step) decides."""

from itertools import pairwise

import pytest
import torch

from gan.sampling import batch_indices, step_rng


def epoch(count: int, batch_size: int, seed: int = 0, first: int = 0, world_size: int = 1) -> list[int]:
    """The indices of a whole number of steps that make an epoch, over all ranks."""
    steps = count // (batch_size * world_size)
    return [
        index
        for step in range(first * steps, (first + 1) * steps)
        for rank in range(world_size)
        for index in batch_indices(count, batch_size, seed, step, rank, world_size).tolist()
    ]


@pytest.mark.parametrize(
    ("count", "batch_size", "world_size"), [(60, 10, 1), (60, 60, 1), (64, 8, 4), (7, 1, 1)]
)
def test_an_epoch_covers_every_image_once(count: int, batch_size: int, world_size: int) -> None:
    epochs = [epoch(count, batch_size, first=i, world_size=world_size) for i in range(3)]
    for indices in epochs:
        assert sorted(indices) == list(range(count))
    for one, other in pairwise(epochs):
        assert one != other  # a fresh permutation


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (10, 7), (5, 8), (3, 20), (1, 4)])
def test_batches_run_on_over_the_end_of_an_epoch(count: int, batch_size: int) -> None:
    batches = [batch_indices(count, batch_size, 0, step) for step in range(count * 3)]
    assert all(len(batch) == batch_size for batch in batches)
    seen = torch.cat(batches)
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count].tolist()) == list(range(count))


def test_ranks_are_disjoint_and_together_one_process() -> None:
    for step in range(3):
        parts = [batch_indices(48, 4, 0, step, rank, 4) for rank in range(4)]
        together = torch.cat(parts)
        assert together.unique().numel() == 16
        assert torch.equal(together, batch_indices(48, 16, 0, step))


def test_the_seed_and_the_step_decide_and_nothing_else() -> None:
    before = torch.get_rng_state()
    first = [batch_indices(50, 7, 3, step) for step in range(20)]
    again = [batch_indices(50, 7, 3, step) for step in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first[0], batch_indices(50, 7, 4, 0))
    first[0].zero_()  # a caller may write on it
    assert torch.equal(batch_indices(50, 7, 3, 0), again[0])


def test_streams_are_distinct() -> None:
    """Of steps, seeds and ranks, also where their digits run together: 1/11 and 11/1."""
    keys = [
        (seed, step, rank) for seed in (0, 1, 11, 111) for step in (0, 1, 11, 111) for rank in (-1, 0, 1, 11)
    ]
    draws = {tuple(torch.randn(4, generator=step_rng(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_a_stream_is_reproducible_and_as_normal_as_any() -> None:
    assert torch.equal(torch.rand(5, generator=step_rng(1, 2)), torch.rand(5, generator=step_rng(1, 2, 0)))
    first = torch.stack([torch.randn(16, generator=step_rng(0, step)) for step in range(500)])
    assert abs(float(first.mean())) < 0.05
    assert abs(float(first.std()) - 1) < 0.05
    # Neighbouring steps are not correlated.
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.05
