"""Make token files of text, for `l2e-ds tokenize` and for the preparation of a run.

This process reads raw chunks and writes results, both in input order. Worker processes (or this one) parse, hash and
tokenize them. What is written does not depend on the number of workers. n: documents of a chunk.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from l2e_ds.config.sections import DataConfig
from l2e_ds.data.encode import Encoded, Encoder, digest
from l2e_ds.data.sources import Chunk, chunks, documents, input_bytes, name_of, source_files
from l2e_ds.data.token_files import TokenFiles
from l2e_ds.data.workers import WorkerPool
from l2e_ds.errors import DataError

OPTIONS = {
    "data.path": "",  # INPUT needs no name of its own
    "data.text_key": "--text-key",
    "data.held_out": "--held-out",
    "data.split": "--split",
    "data.tokenizer": "--tokenizer",
    "data.train_tokenizer": "--vocab-size",
}
"""The options that errors of `l2e-ds tokenize` and `tokenizer train` name in place of a run file's keys."""
_SAY_EVERY = 30.0  # seconds between two reports of progress, if stderr is no terminal


@dataclass(frozen=True)
class Split:
    """Decides which documents are held out, by a hash of their content: equal documents are on the same side."""

    share: float
    also: int | None = None
    """Digest of a document that is held out although its hash says otherwise."""

    def held_out(self, digests: np.ndarray) -> np.ndarray:
        """Return which documents are held out, bool [n], given their digests, uint64 [n]."""
        chosen = digests < np.uint64(math.ceil(self.share * 2.0**64))
        return chosen if self.also is None else chosen | (digests == np.uint64(self.also))

    def holds_out(self, text: str) -> bool:
        return bool(self.held_out(np.array([digest(text)], np.uint64))[0])


def find_split(config: DataConfig, skip_bad: bool = False) -> Split:
    """Return the split of a source. If the hash holds out no document of a small corpus, the last one is held out.

    Raises DataError if the source does not hold two different documents.
    """
    split = Split(config.held_out)
    if config.held_out == 0:
        return split
    last: int | None = None
    is_other = False  # whether any document differs from the one before it
    for text in documents(config, skip_bad):
        if split.holds_out(text):
            return split
        before, last = last, digest(text)
        is_other = is_other or before not in (None, last)
    if not is_other:
        raise _too_few(config)
    return Split(config.held_out, also=last)


def _too_few(config: DataConfig) -> DataError:
    problem = f"{name_of(config)} holds fewer than 2 different documents, one to train on and one to hold out;"
    return DataError(f"{problem} give more, or set ", "data.held_out", " to 0", where="data.held_out")


def check_split(config: DataConfig) -> None:
    """Raise DataError for a single file that is one document, where some are to be held out."""
    if config.source == "text" and config.held_out and len(source_files(config)) == 1:
        raise _too_few(config)


@dataclass
class Counts:
    """How many records were read so far, and what was done with them."""

    read: int = 0
    """Documents read: records with text, as max_documents counts them."""
    documents: dict[str, int] = field(default_factory=dict)
    """Documents written, by part."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens written, by part."""
    duplicates: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str | None = None
    complete: bool = False
    """Whether nothing more is to be read: the input ended, or a limit is reached."""


class Seen:
    """The set of digests seen so far: sorted arrays, which are merged when they become similar in size.

    Takes about 8 bytes for each digest, and 16 while the largest arrays are merged.
    """

    def __init__(self, digests: np.ndarray) -> None:
        self._sorted = [np.sort(digests)] if len(digests) else []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests, uint64 [n], and return which of them are new, bool [n]; of equal ones, the first."""
        is_new = np.zeros(len(digests), bool)
        unique, first = np.unique(digests, return_index=True)
        is_known = np.zeros(len(unique), bool)
        for part in self._sorted:
            at = np.minimum(np.searchsorted(part, unique), len(part) - 1)
            is_known |= part[at] == unique
        is_new[first[~is_known]] = True
        if not is_known.all():
            self._sorted.append(unique[~is_known])
        while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]))
        return is_new


def tokenize(
    config: DataConfig,
    tokenizer: str,
    end_of_text: int | None,
    files: TokenFiles,
    split: Split | None = None,
    deduplicate: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
) -> Counts:
    """Write the documents of a source into the parts `train` and, if some are held out, `held_out` of `files`.

    Resumes where `files` was left. Ends with the input, or when `train` holds max_tokens and `held_out` a document, or
    when max_documents are read.

    tokenizer: the content of a tokenizer.json. end_of_text: id to put after each document, or None. split: by default
    that of `find_split`. deduplicate: keep only the first of identical documents. workers: processes that tokenize; 0:
    this one. Raises DataError, and OSError if `files` cannot be written.
    """
    if files.resumes:
        split, counts = Split(config.held_out, files.notes["also"]), Counts(**files.notes["counts"])
    else:
        split, counts = split or find_split(config, skip_bad), Counts()
        counts.documents, counts.tokens = dict.fromkeys(files.parts, 0), dict.fromkeys(files.parts, 0)
    seen = Seen(files.digests()) if deduplicate else None
    start = files.position
    positions: deque[dict[str, Any]] = deque()

    def raw_chunks() -> Iterator[Chunk]:
        for chunk, position in chunks(config, start):
            positions.append(position)
            yield chunk

    pool: WorkerPool[Chunk, Encoded] = WorkerPool(
        workers, Encoder, tokenizer, config.text_key, end_of_text, files.dtype, skip_bad
    )
    pause = 0.1 if sys.stderr.isatty() else _SAY_EVERY
    size: dict[str, Any] = {"total": input_bytes(config), "initial": start["bytes"] if start else 0, "unit": "B"}
    with tqdm(desc="tokenizing", unit_scale=True, mininterval=pause, delay=pause, **size) as bar, pool:
        for encoded in () if counts.complete else pool.map(raw_chunks()):
            _add_chunk(encoded, config, split, seen, counts, files, skip_bad)
            position = positions.popleft()
            files.advance(position, {"also": split.also, "counts": asdict(counts)})
            bar.set_postfix_str(f"{sum(counts.tokens.values()):,} tokens", refresh=False)
            bar.update(position["bytes"] - bar.n)
            if counts.complete:
                break
        else:
            counts.complete = True
    if not sum(counts.documents.values()):
        raise DataError(f"{name_of(config)} holds no text", where="data.path")
    return counts


def _add_chunk(
    encoded: Encoded,
    config: DataConfig,
    split: Split,
    seen: Seen | None,
    counts: Counts,
    files: TokenFiles,
    skip_bad: bool,
) -> None:
    """Write the documents of a chunk that are wanted. Raises the chunk's error if its bad record is wanted."""
    lengths, digests = encoded.lengths, encoded.digests
    wanted = np.ones(len(lengths), bool)  # by document
    if config.max_documents is not None:
        left = config.max_documents - counts.read
        wanted[left:] = False
        counts.complete = len(wanted) >= left
    counts.read += int(wanted.sum())
    held_out = split.held_out(digests)
    if seen is not None:
        # Adding only wanted documents makes `seen` independent of how the input is cut into chunks.
        is_new = np.zeros_like(wanted)
        is_new[wanted] = seen.add(digests[wanted])
        counts.duplicates += int((wanted & ~is_new).sum())
        wanted = is_new
        files.add_digests(digests[wanted])
    if config.max_tokens is not None:
        train_lengths = lengths * (wanted & ~held_out)
        tokens_before = counts.tokens["train"] + np.cumsum(train_lengths) - train_lengths  # before each document
        is_full = tokens_before >= config.max_tokens
        late = wanted & held_out & is_full
        wanted &= ~is_full
        if not counts.documents.get("held_out") and not (wanted & held_out).any() and late.any():
            wanted[int(late.argmax())] = True  # the one held-out document that was still missing
        ends_full = counts.tokens["train"] + int((lengths * (wanted & ~held_out)).sum()) >= config.max_tokens
        has_held_out = not split.share or counts.documents["held_out"] > 0 or bool((wanted & held_out).any())
        counts.complete |= ends_full and has_held_out
    if encoded.error is not None and not skip_bad and not counts.complete:
        raise encoded.error
    counts.empty += encoded.empty
    counts.bad += encoded.bad
    if encoded.error is not None and counts.first_bad is None and skip_bad:
        encoded.error.rename(OPTIONS)
        counts.first_bad = str(encoded.error)
    for part in files.parts:
        chosen = wanted & (held_out if part == "held_out" else ~held_out)
        tokens = encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, lengths)]
        files.add(part, tokens, lengths[chosen])
        counts.documents[part] += int(chosen.sum())
        counts.tokens[part] += len(tokens)
