"""Sequences of equal length, packed over a flat array of tokens. T: tokens a sequence, n: sequences a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from l2e_ds.data.indexed import IndexedTokens, TokenParts
from l2e_ds.errors import DataError


class TokenDataset:
    """The sequences of T + 1 tokens, each T inputs and, shifted by one, T targets, in tokens[start:stop].

    Sequence i begins at start + i*stride. With the default stride T, as in Megatron and GPT-NeoX, the last target of a
    sequence is the first input of the next. Stride T + 1 is for data stored as separate sequences of T + 1 tokens
    (Pythia's preshuffled Pile).

    tokens: integers, flat, usually memory-mapped. name: what errors call the file. documents: the set that `tokens`
    belong to. With stride T + 1 all its documents must have T + 1 tokens, which is checked for every sequence read.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenParts,
        start: int,
        stop: int,
        sequence_length: int,
        vocab_size: int,
        name: str,
        stride: int | None = None,
        documents: IndexedTokens | None = None,
    ) -> None:
        self.tokens, self.start, self.stop = tokens, start, stop
        self.sequence_length, self.vocab_size, self.name = sequence_length, vocab_size, name
        self.stride = sequence_length if stride is None else stride
        self.documents = documents

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    def __len__(self) -> int:
        return max(0, (self.num_tokens - self.sequence_length - 1) // self.stride + 1)

    def __getitem__(self, i: int) -> np.ndarray:
        """Return sequence i, int64 [T+1]. Raises what `batch` raises."""
        return self.batch([i])[0]

    def _evenly_spaced(self, count: int) -> np.ndarray:
        return np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))

    def check_vocabulary(self, at_most: int = 1 << 21) -> None:
        """Raise DataError if an id is outside the vocabulary, as far as about `at_most` tokens tell.

        They are those of evenly spaced sequences. Every batch is checked again when it is read.
        """
        count = min(len(self), max(1, at_most // (self.sequence_length + 1)))
        for indices in np.array_split(self._evenly_spaced(count), max(1, count // 512)):
            self.batch(indices)

    def fingerprint(self) -> str:
        """Return 16 hex digits that depend on the content only: the sequences' number and length, and 256 of them."""
        digest = hashlib.sha256(f"{len(self)}/{self.sequence_length}".encode())
        for index in self._evenly_spaced(256):
            digest.update(self[int(index)].tobytes())
        return digest.hexdigest()[:16]

    def position(self, i: int) -> int:
        """Return where sequence i begins in `tokens`."""
        return self.start + int(i) * self.stride

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the sequences with these indices, int64 [n, T+1].

        Raises IndexError, and DataError for an id outside the vocabulary or, with stride T + 1, for a sequence that is
        not one document.
        """
        width = self.sequence_length + 1
        rows = np.empty((len(indices), width), dtype=np.int64)
        numbers = np.asarray(indices, dtype=np.int64)
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if outside.size:
            raise IndexError(f"{self.name}: sequence {outside[0]} of {len(self)}")
        positions = self.start + numbers * self.stride
        if self.documents is not None and self.stride == width:
            self._check_documents(self.documents, positions)
        for row, first in zip(rows, positions.tolist(), strict=True):
            row[:] = self.tokens[first : first + width]
        if rows.size and (rows.max() >= self.vocab_size or rows.min() < 0):
            row, column = np.argwhere((rows >= self.vocab_size) | (rows < 0))[0]
            raise DataError(
                f"{self.name}: token id {rows[row, column]} at position {positions[row] + column},"
                f" but model.vocab_size is {self.vocab_size} (ids 0 to {self.vocab_size - 1});"
                " raise that, or give files of another tokenizer"
            )
        return rows

    def _check_documents(self, documents: IndexedTokens, positions: np.ndarray) -> None:
        numbers = positions // self.stride
        starts, stops = documents.starts(numbers), documents.starts(numbers + 1)
        wrong = np.flatnonzero((starts != positions) | (stops != positions + self.stride))
        if wrong.size:
            at = wrong[0]
            raise DataError(
                f"{self.name}: document {numbers[at]} holds tokens {starts[at]} to {stops[at]}, expected"
                f" {positions[at]} to {positions[at] + self.stride}: nearly all documents have {self.stride} tokens,"
                " and so must this one"
            )


def token_dataset(
    indexed: IndexedTokens,
    sequence_length: int,
    vocab_size: int,
    start: int = 0,
    stop: int | None = None,
    packed: bool = False,
) -> TokenDataset:
    """Return the sequences in tokens[start:stop] of a set, which by default is all of it.

    If all documents have T + 1 tokens, each is a sequence, unless the set is known to be `packed`.
    """
    width, stop = sequence_length + 1, indexed.num_tokens if stop is None else stop
    stride = width if not packed and indexed.all_documents_hold(width) else None
    return TokenDataset(indexed.tokens, start, stop, sequence_length, vocab_size, indexed.name, stride, indexed)
