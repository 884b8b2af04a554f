import numpy as np
import pytest

from l2e_ds.data.sampler import SequenceOrder, rank_rows
from l2e_ds.errors import DataError


def batch(n, size, seed, step, order="shuffled"):
    """Global batch `step` of `size` of n sequences."""
    return SequenceOrder(n, seed, order).sequences(step * size + np.arange(size))


def epoch(n, seed=0, number=0):
    """Epoch `number` as one global batch."""
    return batch(n, n, seed, number)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 15, 16, 17, 64, 65, 101, 255, 256, 257, 1000, 1024, 1025, 7919, 65537])
@pytest.mark.parametrize("number", [0, 3])
def test_every_epoch_is_a_permutation(n, number):
    order = epoch(n, seed=7, number=number)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_seeds_and_epochs_differ():
    orders = [epoch(1000, seed, number) for seed in (0, 1, 2, 2**63) for number in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02
    assert np.array_equal(epoch(1000, 1, 1), epoch(1000, 1, 1))


def test_order_is_well_mixed():
    n = 10_000
    order = epoch(n, seed=3)
    places = np.arange(n)
    assert abs(np.corrcoef(places, order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 are expected
    # Where the places of each tenth go: 100 cells of 100 on average (chi squared, 81 degrees of freedom).
    cells = np.histogram2d(places, order, bins=10)[0]
    assert ((cells - 100) ** 2 / 100).sum() < 150


@pytest.mark.parametrize("n", [3, 10])
def test_every_sequence_comes_first_equally_often(n):
    epochs = 6000
    first = batch(n, n * epochs, 5, 0)[::n]
    counts = np.bincount(first, minlength=n)
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 35


def test_global_batches_run_through_epochs_without_a_gap():
    stream = np.concatenate([batch(10, 4, 1, step) for step in range(15)])
    for number in range(6):
        assert np.array_equal(stream[number * 10 : (number + 1) * 10], epoch(10, 1, number))


def test_stored_order():
    assert [batch(10, 4, 1, step, "stored").tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_any_ranks_take_the_same_rows():
    for ranks, micro in [(1, 4), (2, 2), (4, 1)]:
        rows = [rank_rows(16, rank, ranks, micro) for rank in range(ranks)]
        assert [part.shape for part in rows] == [(4, micro)] * ranks
        assert np.array_equal(np.concatenate(rows, axis=1), np.arange(16).reshape(4, 4))


def test_a_far_step_of_a_large_corpus():
    n = 146_432_000
    far = batch(n, 1024, 0, 100_000_000)
    assert len(np.unique(far)) == 1024
    assert far.min() >= 0
    assert far.max() < n
    assert abs(far.mean() / n - 0.5) < 0.05


def test_refusals():
    with pytest.raises(DataError, match="no sequence"):
        SequenceOrder(0, 1)
    for arguments in [(4, 0, 3, 1), (4, 2, 2, 1), (4, -1, 2, 1)]:
        with pytest.raises(ValueError, match="rank|multiple"):
            rank_rows(*arguments)
