"""Which sequences make global batch `step`, from (seed, step) alone.

The shuffle is a keyed permutation that is evaluated at single points: a Feistel network over the smallest power of
four that holds all sequences, repeated until it lands inside ("cycle walking"; Black and Rogaway, 2002). It needs no
memory, and any step costs the same. G: global batch, m: micro-batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from l2e_ds.errors import DataError

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64, elementwise on uint64 (which wraps around)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SequenceOrder:
    """The order in which `num_sequences` sequences are taken, epoch after epoch without a gap.

    `order`: "shuffled", another permutation every epoch, or "stored". Raises DataError without sequences.
    """

    def __init__(self, num_sequences: int, seed: int, order: Literal["shuffled", "stored"] = "shuffled") -> None:
        if num_sequences < 1:
            raise DataError("data: no sequence to sample from; give more text or lower data.sequence_length")
        if order not in ("shuffled", "stored"):
            raise ValueError(f"order {order!r}")
        self.num_sequences, self.seed, self.order = num_sequences, seed, order
        # At least 16 points: fewer leave the network too few bits to mix.
        self._half_bits = max(2, ((num_sequences - 1).bit_length() + 1) // 2)

    def sequences(self, numbers: np.ndarray) -> np.ndarray:
        """Return which sequence is taken as the n-th, for each running number n >= 0; int64, any shape."""
        epochs, places = np.divmod(numbers, self.num_sequences)
        return places if self.order == "stored" else self._permute(places, epochs)

    def _permute(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        seed = _mix(np.array([self.seed % 2**64], dtype=np.uint64) + _GOLDEN)
        keys = _mix(seed + epochs.astype(np.uint64))  # no symmetry: (seed, epoch) and (epoch, seed) differ
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
    """Return rows of a global batch that one rank takes, int64 [accumulation, m].

    Accumulation step a takes rows a*m*ranks to (a+1)*m*ranks, of which rank r takes r*m to (r+1)*m: together the ranks
    see the same sequences in accumulation step a whatever ranks and m are, as long as ranks*m is the same.
    """
    if global_batch % (ranks * micro_batch):
        raise ValueError(f"global batch {global_batch} is not a multiple of {ranks} ranks x {micro_batch}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}")
    return np.arange(global_batch, dtype=np.int64).reshape(-1, ranks, micro_batch)[:, rank]
