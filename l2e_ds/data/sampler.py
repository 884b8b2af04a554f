"""Choose the sequences of a global batch by (seed, step) alone.

The shuffle is a keyed permutation that is evaluated at single points: a Feistel network over the smallest power of
four that is at least the number of sequences, repeated until the result is the number of a sequence ("cycle walking";
Black and Rogaway, 2002). It needs no memory, and every step takes the same time. G: global batch, m: micro-batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from l2e_ds.errors import DataError

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64 to uint64 (which wraps around), elementwise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SequenceOrder:
    """The order in which `num_sequences` sequences are taken, epoch after epoch without a gap.

    order: "shuffled" is another permutation in every epoch, "stored" is the order of the files. Raises DataError if
    there is no sequence.
    """

    def __init__(self, num_sequences: int, seed: int, order: Literal["shuffled", "stored"] = "shuffled") -> None:
        if num_sequences < 1:
            raise DataError("data: no sequence to sample from; give more text or lower data.sequence_length")
        self.num_sequences, self.seed, self.order = num_sequences, seed, order
        # With fewer than 16 points the network has too few bits to mix.
        self._half_bits = max(2, ((num_sequences - 1).bit_length() + 1) // 2)

    def sequences(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sequence that is taken as the n-th, for each running number n >= 0, int64 of any shape."""
        epochs, places = np.divmod(numbers, self.num_sequences)
        return places if self.order == "stored" else self._permute(places, epochs)

    def _permute(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        seed = _mix(np.array([self.seed % 2**64], dtype=np.uint64) + _GOLDEN)
        keys = _mix(seed + epochs.astype(np.uint64))  # not symmetric: (seed, epoch) and (epoch, seed) differ
        values = self._feistel(places.astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self.num_sequences)
        while outside.size:
            values[outside] = self._feistel(values[outside], keys[outside])
            outside = outside[values[outside] >= self.num_sequences]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return a permutation of [0, 4**half_bits) for every key, elementwise."""
        bits = np.uint64(self._half_bits)
        mask = (np.uint64(1) << bits) - np.uint64(1)
        left, right = values >> bits, values & mask
        for _ in range(_ROUNDS):
            keys = _mix(keys + _GOLDEN)
            left, right = right, left ^ (_mix(right ^ keys) & mask)
        return (left << bits) | right


def rank_rows(global_batch: int, rank: int, ranks: int, micro_batch: int) -> np.ndarray:
    """Return the rows of a global batch that one rank takes, int64 [accumulation, m].

    Accumulation step a takes rows a*m*ranks to (a+1)*m*ranks, of which rank r takes r*m to (r+1)*m. So all ranks
    together see the same sequences in accumulation step a for the same product ranks*m. Raises ValueError.
    """
    if global_batch % (ranks * micro_batch):
        raise ValueError(f"global batch {global_batch} is not a multiple of {ranks} ranks x {micro_batch}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    return np.arange(global_batch, dtype=np.int64).reshape(-1, ranks, micro_batch)[:, rank]
