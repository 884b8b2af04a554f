"""Megatron's `.bin/.idx` token files: read (memory-mapped) and write.

`.bin` holds the token ids of all sequences one after the other. `.idx`, little endian:

    bytes 9     b"MMIDIDX\\x00\\x00"
    uint64      version, 1
    uint8       dtype code (`DTYPE_CODES`)
    uint64      S, number of sequences
    uint64      D, entries of the document index
    int32[S]    tokens of each sequence
    int64[S]    byte offset of each sequence in .bin
    int64[D]    first sequence of each document, and S at the end
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from l2e_ds.data.files import fsync_path, temporary_name
from l2e_ds.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")  # after the magic: version, dtype code, sequences, entries of the document index
DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
FLOAT_CODES = (6, 7)
_CHUNK = 1 << 22  # sequences checked at once: bounds memory for an index of 10^8 sequences


def best_dtype(vocab_size: int) -> type[np.integer]:
    """The dtype Megatron stores a vocabulary of this size in: uint16 below 65500, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def pair(prefix: str | Path) -> tuple[Path, Path]:
    """Paths of .bin and .idx. A prefix that already ends in one of them is taken without it."""
    text = str(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + ".bin").expanduser(), Path(text + ".idx").expanduser()


class IndexedTokens:
    """A memory-mapped .bin/.idx pair.

    `tokens`: all token ids, flat [num_tokens], of `dtype`. `lengths`: tokens a document, int [num_documents].
    A document index with fewer than two entries (written where documents were never closed, e.g. preshuffled
    data) means that every sequence is a document.

    Raises DataError where a file is missing, truncated, of another format, or where sequences are not stored
    one after the other from the start of .bin to its end.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.bin_path, self.idx_path = pair(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(f"{path}: no such file; an indexed data set is a pair PREFIX.bin and PREFIX.idx")
        try:
            self._read_index()
            stored = self.bin_path.stat().st_size
            self._check_contiguous(stored)
            self.tokens: np.ndarray = (
                np.memmap(self.bin_path, dtype=self.dtype, mode="r") if stored else np.empty(0, self.dtype)
            )
        except OSError as error:
            raise DataError(f"{error.filename or self.idx_path}: {error.strerror}") from None

    def _read_index(self) -> None:
        start = len(MAGIC) + HEADER.size
        with open(self.idx_path, "rb") as file:
            head = file.read(start)
        if not head.startswith(MAGIC):
            raise DataError(f"{self.idx_path}: not a Megatron index, it does not begin with {MAGIC!r}")
        if len(head) < start:
            raise DataError(f"{self.idx_path}: truncated, {len(head)} bytes are less than the header's {start}")
        version, code, sequences, entries = HEADER.unpack(head[len(MAGIC) :])
        if version != VERSION:
            raise DataError(f"{self.idx_path}: version {version}, only version {VERSION} is known")
        if code not in DTYPE_CODES:
            kind = "floating point numbers, not token ids" if code in FLOAT_CODES else "unknown"
            raise DataError(f"{self.idx_path}: dtype code {code} is {kind}; allowed: {sorted(DTYPE_CODES)}")
        expected, found = start + 12 * sequences + 8 * entries, self.idx_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{self.idx_path}: {found} bytes, but {sequences} sequences and {entries} document entries"
                f" take {expected}"
            )
        self.dtype = np.dtype(DTYPE_CODES[code]).newbyteorder("<")
        raw = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        pointers_at, documents_at = start + 4 * sequences, start + 12 * sequences
        self._sequence_lengths = raw[start:pointers_at].view("<i4")
        self._pointers = raw[pointers_at:documents_at].view("<i8")
        index = raw[documents_at:].view("<i8")
        if entries > 1 and (index[0] != 0 or index[-1] != sequences or (np.diff(index) < 0).any()):
            raise DataError(f"{self.idx_path}: the document index must rise from 0 to {sequences}, number of sequences")
        # None: document i is sequence i, and the (long) index need not be read again.
        trivial = entries < 2 or (entries == sequences + 1 and bool((np.diff(index) == 1).all()))
        self._first_sequence = None if trivial else index

    def _check_contiguous(self, stored: int) -> None:
        offset = 0
        for first in range(0, len(self._sequence_lengths), _CHUNK):
            lengths = self._sequence_lengths[first : first + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise DataError(f"{self.idx_path}: sequence {first + int(lengths.argmin())} has a negative length")
            sizes = lengths * self.dtype.itemsize
            starts = offset + np.cumsum(sizes) - sizes
            wrong = self._pointers[first : first + _CHUNK] != starts
            if wrong.any():
                at = first + int(wrong.argmax())
                raise DataError(
                    f"{self.idx_path}: sequence {at} begins at byte {self._pointers[at]}, must be {starts[at - first]}:"
                    " sequences have to be stored one after the other"
                )
            offset = int(starts[-1] + sizes[-1])
        if stored != offset:
            raise DataError(f"{self.bin_path}: {stored} bytes, but {self.idx_path.name} describes {offset}")

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._sequence_lengths) if self._first_sequence is None else len(self._first_sequence) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a document, int [num_documents]."""
        if self._first_sequence is None:
            return self._sequence_lengths
        ends = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return np.diff(ends[self._first_sequence])

    def start(self, i: int) -> int:
        """Position in `tokens` of the first token of document i; num_tokens for i = num_documents."""
        if not 0 <= i <= self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        sequence = i if self._first_sequence is None else int(self._first_sequence[i])
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document(self, i: int) -> np.ndarray:
        """Token ids of document i, a read-only view of `tokens`."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        return self.tokens[self.start(i) : self.start(i + 1)]


class IndexedWriter:
    """Writes a .bin/.idx pair, one sequence a document; both appear under their names only at the end.

    A context manager: on a normal exit .bin, then .idx are published; on an exception nothing is left.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.integer]) -> None:
        self.bin_path, self.idx_path = pair(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, known in DTYPE_CODES.items() if known is dtype), 0)
        if not self._code:
            allowed = ", ".join(known.__name__ for known in DTYPE_CODES.values())
            raise DataError(f"{self.bin_path}: tokens cannot be stored as {np.dtype(dtype)}; allowed: {allowed}")
        limits = np.iinfo(dtype)
        self._smallest, self._largest = int(limits.min), int(limits.max)
        self._lengths = array("q")
        self.tokens = 0
        self._temporary_bin, self._temporary_idx = temporary_name(self.bin_path), temporary_name(self.idx_path)
        self._file: BinaryIO

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def __enter__(self) -> IndexedWriter:
        self._file = open(self._temporary_bin, "wb")
        return self

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document, integers [n]. Raises DataError for an id that the dtype cannot hold."""
        ids = np.asarray(tokens) if len(tokens) else np.empty(0, np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"{self.bin_path}: a document is a flat list of integers, got {ids.dtype} {ids.shape}")
        if ids.size:
            for extreme in (int(ids.min()), int(ids.max())):
                if not self._smallest <= extreme <= self._largest:
                    raise DataError(
                        f"{self.bin_path}: token id {extreme} does not fit {self.dtype.name}"
                        f" ({self._smallest} to {self._largest})"
                    )
        if ids.size > np.iinfo(np.int32).max:
            raise DataError(f"{self.bin_path}: a document of {ids.size} tokens; at most {np.iinfo(np.int32).max} fit")
        self._file.write(ids.astype(self.dtype).tobytes())
        self._lengths.append(ids.size)
        self.tokens += ids.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                self._write_index()
                for temporary in (self._temporary_bin, self._temporary_idx):
                    fsync_path(temporary)
                os.replace(self._temporary_bin, self.bin_path)
                os.replace(self._temporary_idx, self.idx_path)
                fsync_path(self.bin_path.parent)
        finally:
            for temporary in (self._temporary_bin, self._temporary_idx):
                temporary.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, np.int64) if self._lengths else np.empty(0, np.int64)
        count = len(lengths)
        with open(self._temporary_idx, "wb") as file:
            file.write(MAGIC + HEADER.pack(VERSION, self._code, count, count + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write(((np.cumsum(lengths) - lengths) * self.dtype.itemsize).astype("<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
