import numpy as np
import pytest

from l2e_ds.data import TokenDataset
from l2e_ds.errors import DataError


def dataset(count=20, start=0, stop=None, length=4, vocab_size=100, **more):
    tokens = np.arange(count, dtype=np.uint16)
    return TokenDataset(tokens, start, count if stop is None else stop, length, vocab_size, "a.bin", **more)


def test_neighbours_share_one_token():
    data = dataset()
    assert data[0].tolist() == [0, 1, 2, 3, 4]
    assert data[1].tolist() == [4, 5, 6, 7, 8]
    assert data[0].dtype == np.int64


def test_separate_sequences_share_none():
    data = dataset(stride=5)
    assert len(data) == 4
    assert data.batch([0, 3]).tolist() == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2), (20, 4), (21, 5)])
def test_length(count, expected):
    data = dataset(count)
    assert len(data) == expected
    with pytest.raises(IndexError):
        data[expected]
    if expected:
        assert data[expected - 1][-1] == expected * 4


@pytest.mark.parametrize(("count", "expected"), [(4, 0), (5, 1), (9, 1), (10, 2)])
def test_length_of_separate_sequences(count, expected):
    assert len(dataset(count, stride=5)) == expected


def test_range_within_a_file():
    data = dataset(start=3, stop=12)
    assert len(data) == 2
    assert data.batch(np.array([1, 0])).tolist() == [[7, 8, 9, 10, 11], [3, 4, 5, 6, 7]]
    assert data.batch(np.array([1, 0])).dtype == np.int64


def test_negative_index_is_refused():
    with pytest.raises(IndexError):
        dataset().batch([-1])


def test_foreign_token_is_named():
    data = dataset(start=3, vocab_size=10)
    assert data[0].tolist() == [3, 4, 5, 6, 7]
    with pytest.raises(DataError, match=r"a\.bin: token id 10 at position 10, but model\.vocab_size is 10"):
        data.batch([0, 1])
    negative = TokenDataset(np.array([1, 2, -7, 3], dtype=np.int32), 0, 4, 3, 10, "a.bin")
    with pytest.raises(DataError, match="token id -7 at position 2"):
        negative[0]


def test_vocabulary_of_a_large_set_is_checked_at_evenly_spaced_sequences():
    tokens = np.zeros(401, dtype=np.uint16)
    data = TokenDataset(tokens, 0, 401, 4, 100, "a.bin")
    for sequence, noticed in ((0, True), (1, False), (50, False), (99, True)):
        tokens[:] = 0
        tokens[sequence * 4 + 2] = 100
        if noticed:
            with pytest.raises(DataError, match=f"token id 100 at position {sequence * 4 + 2}"):
                data.check_vocabulary(at_most=10)  # two sequences of 5 tokens
        else:
            data.check_vocabulary(at_most=10)
        with pytest.raises(DataError):
            data.check_vocabulary()
