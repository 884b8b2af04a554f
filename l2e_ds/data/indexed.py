"""Read (memory-mapped) and write Megatron's `.bin/.idx` token files.

The format is that of Megatron-LM (megatron/core/datasets/indexed_dataset.py) and GPT-NeoX
(megatron/data/indexed_dataset.py).

`.bin` holds the token ids of all sequences one after the other. `.idx`, little endian:

    bytes 9     b"MMIDIDX\\x00\\x00"
    uint64      version, 1
    uint8       dtype code (`DTYPE_CODES`)
    uint64      S, number of sequences
    uint64      D, entries of the document index
    int32[S]    tokens of each sequence
    int64[S]    byte offset of each sequence in .bin
    int64[D]    first sequence of each document, and S at the end

The .bin may be split into several files, as in Pythia's release: PREFIX-00000-of-00020.bin to
PREFIX-00020-of-00020.bin (EleutherAI/pythia, utils/unshard_memmap.py, numbers them 0 to N of N), or 0 to N-1 of N.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from l2e_ds.errors import DataError
from l2e_ds.system.files import fsync_path, temporary_name

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
_CHUNK = 1 << 20  # entries of the index that are read at once, which bounds memory for an index of 10^8 sequences
# When a set is opened, this many spans of this many sequences are checked, evenly spaced over the index: two or three
# pages each, however long the index is.
_SPANS, _SPAN = 64, 256


def best_dtype(vocab_size: int) -> type[np.integer]:
    """Return the dtype in which Megatron stores a vocabulary of this size: uint16 below 65500, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def pair(prefix: str | Path) -> tuple[Path, Path]:
    """Return the paths of .bin and .idx. Either suffix is dropped from a prefix that ends in it."""
    text = str(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + ".bin").expanduser(), Path(text + ".idx").expanduser()


def read_sidecar(prefix: str | Path) -> dict[str, Any]:
    """Return PREFIX.json, in which `l2e-ds tokenize` describes its files, or {} if there is none. Raises DataError."""
    path = pair(prefix)[0].with_suffix(".json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: must be a JSON object")
    return found


class TokenParts:
    """Several flat arrays of one dtype that are read as one, by `len` and slices.

    A slice is a view if it lies within one of the arrays, else a copy.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._starts = [0, *np.cumsum([len(part) for part in parts]).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}")
        first = max(0, min(bisect_right(self._starts, start), len(self._parts)) - 1)
        slices = []
        for part, begin in zip(self._parts[first:], self._starts[first:], strict=False):
            slices.append(part[max(0, start - begin) : max(0, stop - begin)])
            if begin + len(part) >= stop:
                break
        return slices[0] if len(slices) == 1 else np.concatenate(slices)


class _Pair:
    """One .idx and its .bin, or the files into which that is split. Opening it takes the same time for any length.

    tokens: how many; lengths: tokens of each sequence, int32 [S]; pointers: byte offset of each sequence, int64 [S];
    first_sequence: first sequence of each document, int64 [D], or None if document i is sequence i.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.bin_path, self.idx_path = pair(prefix)
        self.bin_paths = _bin_files(self.bin_path)
        if not self.idx_path.is_file():
            raise _no_such_file(self.idx_path)
        try:
            self._read_header()
            self._check_ends()
            for first in _evenly_spaced_spans(self.sequences):
                self.check_sequences(first, min(self.sequences, first + _SPAN))
            for first in _evenly_spaced_spans(self.documents):
                self.check_documents(first, min(self.documents, first + _SPAN))
            self.tokens = self._check_sizes() // self.dtype.itemsize
            self.parts = [np.frombuffer(_map(path), self.dtype) for path in self.bin_paths]
        except OSError as error:
            raise DataError(f"{error.filename or self.idx_path}: {error.strerror}") from None

    def _read_header(self) -> None:
        start = len(MAGIC) + HEADER.size
        with open(self.idx_path, "rb") as file:
            head = file.read(start)
        if not head.startswith(MAGIC):
            raise DataError(f"{self.idx_path}: not a Megatron index, it does not begin with {MAGIC!r}")
        if len(head) < start:
            raise DataError(f"{self.idx_path}: truncated, {len(head)} bytes are less than the header's {start}")
        version, code, self.sequences, entries = HEADER.unpack(head[len(MAGIC) :])
        if version != VERSION:
            raise DataError(f"{self.idx_path}: version {version}, only version {VERSION} is known")
        if code not in DTYPE_CODES:
            allowed = f"those of integers are {sorted(DTYPE_CODES)}"
            raise DataError(f"{self.idx_path}: dtype code {code} is floating point or unknown; {allowed}")
        expected, found = start + 12 * self.sequences + 8 * entries, self.idx_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{self.idx_path}: {found} bytes, but {self.sequences} sequences and {entries} document entries"
                f" take {expected}"
            )
        self.dtype = np.dtype(DTYPE_CODES[code]).newbyteorder("<")
        self._map = _map(self.idx_path)
        raw = np.frombuffer(self._map, np.uint8)
        pointers_at, documents_at = start + 4 * self.sequences, start + 12 * self.sequences
        self.lengths = raw[start:pointers_at].view("<i4")
        self.pointers = raw[pointers_at:documents_at].view("<i8")
        self.first_sequence = raw[documents_at:].view("<i8") if entries > 1 else None
        self.documents = self.sequences if entries < 2 else entries - 1

    def _check_ends(self) -> None:
        index = self.first_sequence
        if index is not None and (index[0] != 0 or index[-1] != self.sequences):
            raise self._bad_document_index()
        if self.sequences and self.pointers[0] != 0:
            raise self._bad_pointer(0, 0)

    def _check_sizes(self) -> int:
        """Return the bytes of all sequences. Raises DataError if the .bin files hold another number of bytes."""
        sizes = [path.stat().st_size for path in self.bin_paths]
        width = self.dtype.itemsize
        described = int(self.pointers[-1]) + int(self.lengths[-1]) * width if self.sequences else 0
        if sum(sizes) != described:
            more = f" and {len(sizes) - 1} more parts" if len(sizes) > 1 else ""
            raise DataError(
                f"{self.bin_paths[0]}{more}: {sum(sizes)} bytes, but {self.idx_path.name} describes {described}"
            )
        for path, size in zip(self.bin_paths, sizes, strict=True):
            if size % width:
                raise DataError(f"{path}: {size} bytes are no whole number of tokens of {width} bytes")
        return described

    def check_sequences(self, first: int, stop: int) -> None:
        """Raise DataError if one of these sequences does not begin where the one before it ends."""
        begin = max(0, first - 1)
        lengths = self.lengths[begin:stop].astype(np.int64)
        if len(lengths) and lengths.min() < 0:
            raise DataError(f"{self.idx_path}: sequence {begin + int(lengths.argmin())} has a negative length")
        pointers = self.pointers[begin:stop]
        ends = pointers + lengths * self.dtype.itemsize
        wrong = np.flatnonzero(pointers[1:] != ends[:-1])
        if wrong.size:
            raise self._bad_pointer(begin + int(wrong[0]) + 1, int(ends[wrong[0]]))

    def check_documents(self, first: int, stop: int) -> None:
        """Raise DataError if the document index decreases anywhere within these documents."""
        if self.first_sequence is not None and (np.diff(self.first_sequence[first : stop + 1]) < 0).any():
            raise self._bad_document_index()

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """Return the position of each document's first token within this pair, int64 [n]. Raises DataError.

        Document `self.documents`, behind the last one, begins at `self.tokens`.
        """
        sequences = documents if self.first_sequence is None else self.first_sequence[documents]
        if sequences.size and (sequences.min() < 0 or sequences.max() > self.sequences):
            raise self._bad_document_index()
        starts = np.full(len(sequences), self.tokens, dtype=np.int64)
        inside = sequences < self.sequences
        starts[inside] = self.pointers[sequences[inside]] // self.dtype.itemsize
        if starts.size and (starts.min() < 0 or starts.max() > self.tokens):
            at = sequences[((starts < 0) | (starts > self.tokens)).argmax()]
            raise DataError(f"{self.idx_path}: sequence {at} begins at byte {self.pointers[at]}, outside of the tokens")
        return starts

    @contextmanager
    def read_through(self) -> Iterator[Callable[[], None]]:
        """Read ahead while the whole index is read from its start to its end.

        Yields a function to call now and then: it releases the pages that were read, or else the whole index would stay
        in memory.
        """
        content = self._map
        assert isinstance(content, mmap.mmap)  # an index is never empty
        content.madvise(mmap.MADV_SEQUENTIAL)
        try:
            yield lambda: content.madvise(mmap.MADV_DONTNEED)
        finally:
            content.madvise(mmap.MADV_RANDOM)

    def _bad_pointer(self, sequence: int, expected: int) -> DataError:
        return DataError(
            f"{self.idx_path}: sequence {sequence} begins at byte {self.pointers[sequence]}, must be {expected}:"
            " sequences have to be stored one after the other"
        )

    def _bad_document_index(self) -> DataError:
        return DataError(
            f"{self.idx_path}: the document index must rise from 0 to {self.sequences}, number of sequences"
        )


def _no_such_file(path: Path) -> DataError:
    return DataError(f"{path}: no such file; an indexed data set is a pair PREFIX.bin and PREFIX.idx")


def _bin_files(path: Path) -> list[Path]:
    """Return PREFIX.bin, or the files into which it is split, in order. Raises DataError if one is missing."""
    if path.is_file():
        return [path]
    part_name = re.compile(re.escape(path.stem) + r"-(\d+)-of-(\d+)\.bin")
    siblings = path.parent.iterdir() if path.parent.is_dir() else []
    matches = {file: match for file in siblings if (match := part_name.fullmatch(file.name))}
    if not matches:
        raise _no_such_file(path)
    totals = sorted({match[2] for match in matches.values()})
    if len(totals) > 1:
        raise DataError(f"{path}: parts of different sets lie here: {path.stem}-*-of-{{{','.join(totals)}}}.bin")
    parts = {int(match[1]): file for file, match in matches.items()}
    total = int(totals[0])
    for number in range(total):  # only the sizes tell whether there must be a part N of N, too
        if number not in parts:
            raise DataError(f"{path.with_name(f'{path.stem}-{number:05}-of-{totals[0]}.bin')}: no such file")
    if max(parts) > total:
        raise DataError(f"{parts[max(parts)]}: a part number beyond {total}")
    return [parts[number] for number in sorted(parts)]


def _map(path: Path) -> mmap.mmap | bytes:
    """Return a file's content, memory-mapped; an access reads one page, not megabytes around it as by default."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content.madvise(mmap.MADV_RANDOM)
    return content


def _evenly_spaced_spans(count: int) -> list[int]:
    """Return where spans of _SPAN entries begin: all of them that cover `count` entries, but _SPANS at most."""
    if count <= _SPANS * _SPAN:
        return list(range(0, count, _SPAN))
    return np.linspace(0, count - _SPAN, _SPANS).astype(np.int64).tolist()


class IndexedTokens:
    """One or several memory-mapped .bin/.idx pairs, read one after the other as one set.

    tokens: all token ids, flat, of `dtype`; a TokenParts if they lie in several files.
    files: each .bin file and its tokens.
    name: what errors call the files.

    If the document index has fewer than two entries, every sequence is a document. (Writers that never close a
    document, as for preshuffled data, leave such an index.)

    Opening a set reads headers, sizes and evenly spaced entries of the index; `check_index` reads all entries. Raises
    DataError if a file is missing, truncated or of another format, or if sequences turn out not to be stored one after
    the other from the start of .bin to its end.
    """

    def __init__(self, prefixes: str | Path | Sequence[str | Path]) -> None:
        self._pairs = [_Pair(prefix) for prefix in ([prefixes] if isinstance(prefixes, (str, Path)) else prefixes)]
        first = self._pairs[0]
        for other in self._pairs[1:]:
            if other.dtype != first.dtype:
                raise DataError(
                    f"{other.idx_path}: holds {other.dtype.name}, {first.idx_path} {first.dtype.name}: sets of"
                    " different dtypes cannot be one"
                )
        self.dtype = first.dtype
        self.idx_path = first.idx_path
        self.files = [(path, part) for one in self._pairs for path, part in zip(one.bin_paths, one.parts, strict=True)]
        self.name = str(self.files[0][0]) + (f" (and {len(self.files) - 1} more)" if len(self.files) > 1 else "")
        parts = [part for _, part in self.files]
        self.tokens: np.ndarray | TokenParts = parts[0] if len(parts) == 1 else TokenParts(parts)
        self._first_token = [0, *np.cumsum([one.tokens for one in self._pairs]).tolist()]
        self._first_document = [0, *np.cumsum([one.documents for one in self._pairs]).tolist()]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return self._first_document[-1]

    def lengths_in_chunks(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, int64 [num_documents], piece by piece, in constant memory."""
        for one in self._pairs:
            with one.read_through() as release:
                for first in range(0, one.documents, _CHUNK):
                    yield np.diff(one.starts(np.arange(first, min(first + _CHUNK, one.documents) + 1)))
                    release()

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """Return the position in `tokens` of each document's first token, int64 [n]; num_tokens for num_documents."""
        documents = np.asarray(documents)
        if documents.size and not (documents.min() >= 0 and documents.max() <= self.num_documents):
            raise IndexError(f"documents {documents.min()} to {documents.max()} of {self.num_documents}")
        if len(self._pairs) == 1:
            return self._pairs[0].starts(documents)
        starts = np.full(len(documents), self.num_tokens, dtype=np.int64)
        for one, first, stop, token in zip(
            self._pairs, self._first_document, self._first_document[1:], self._first_token, strict=False
        ):
            here = (documents >= first) & (documents < stop)
            starts[here] = token + one.starts(documents[here] - first)
        return starts

    def start(self, i: int) -> int:
        """Return the position in `tokens` of the first token of document i; num_tokens for i = num_documents."""
        return int(self.starts(np.array([i]))[0])

    def document_at(self, position: int) -> int:
        """Return the document that holds the token at this position, by a binary search in the index."""
        return bisect_right(range(self.num_documents + 1), position, key=self.start) - 1

    def all_documents_hold(self, length: int) -> bool:
        """Return whether every document has `length` tokens, as far as totals and evenly spaced documents tell."""
        if self.num_documents == 0 or self.num_tokens != self.num_documents * length:
            return False
        for first in _evenly_spaced_spans(self.num_documents):
            documents = np.arange(first, min(self.num_documents, first + _SPAN) + 1)
            if (self.starts(documents) != documents * length).any():
                return False
        return True

    def check_index(self, advance: Callable[[int], object]) -> None:
        """Check the whole index, in constant memory. Calls advance(n) after n more sequences. Raises DataError."""
        for one in self._pairs:
            with one.read_through() as release:
                for first in range(0, max(one.sequences, one.documents), _CHUNK):
                    stop = first + _CHUNK
                    one.check_sequences(min(first, one.sequences), min(stop, one.sequences))
                    one.check_documents(min(first, one.documents), min(stop, one.documents))
                    release()
                    advance(max(0, min(stop, one.sequences) - first))

    @property
    def num_sequences(self) -> int:
        return sum(one.sequences for one in self._pairs)


def write_pair(prefix: str | Path, documents: Iterable[Sequence[int] | np.ndarray], dtype: type[np.integer]) -> None:
    """Write a .bin/.idx pair with one sequence for each document, integers [n] that the dtype can hold.

    The files take their names when both are complete; an exception leaves neither. Raises OSError.
    """
    stored, lengths = np.dtype(dtype).newbyteorder("<"), []
    final = pair(prefix)
    temporary = [temporary_name(path) for path in final]
    try:
        with open(temporary[0], "wb") as file:
            for document in documents:
                file.write(np.asarray(document, stored).tobytes())
                lengths.append(len(document))
        write_index(temporary[1], stored, np.array(lengths, np.int64))
        for source, path in zip(temporary, final, strict=True):
            fsync_path(source)
            source.replace(path)
        fsync_path(final[0].parent)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write an .idx in which each sequence is a document. Raises OSError.

    lengths: tokens of each sequence, integers [n], possibly memory-mapped.
    """
    count = len(lengths)
    code = next(code for code, known in DTYPE_CODES.items() if dtype == known)
    chunks = [slice(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    with open(path, "wb") as file:
        file.write(MAGIC + HEADER.pack(VERSION, code, count, count + 1))
        for chunk in chunks:
            file.write(lengths[chunk].astype("<i4").tobytes())
        offset = 0
        for chunk in chunks:
            ends = offset + np.cumsum(lengths[chunk], dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        for first in range(0, count + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, count + 1), dtype="<i8").tobytes())
