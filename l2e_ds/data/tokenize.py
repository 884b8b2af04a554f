"""Text -> token files: the pipeline behind `l2e-ds tokenize` and the preparation of a run.

This process reads raw chunks and writes results, both in input order; worker processes (or this one) parse, hash and
tokenise. What is written does not depend on their number. n: documents of a chunk.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from l2e_ds.config.sections import DataConfig
from l2e_ds.console import say
from l2e_ds.data.encode import Encoded, Encoder, digest, encode, set_up
from l2e_ds.data.sources import Chunk, chunks, documents, input_bytes, name_of
from l2e_ds.data.token_files import TokenFiles
from l2e_ds.data.workers import WorkerPool
from l2e_ds.errors import DataError

OPTIONS = {
    "data.path": "",  # the names in INPUT speak for themselves
    "data.text_key": "--text-key",
    "data.held_out": "--held-out",
    "data.split": "--split",
    "data.tokenizer": "--tokenizer",
    "data.train_tokenizer": "--vocab-size",
}
"""What errors of `l2e-ds tokenize` and `tokenizer train` say in place of a run file's keys."""
_SAY_EVERY = 30.0  # seconds, where stderr is no terminal


@dataclass(frozen=True)
class Split:
    """Which documents are held out. Decided by content, so that equal documents lie on the same side."""

    share: float
    also: int | None = None
    """Digest of a document that is held out although its hash says otherwise."""

    def held_out(self, digests: np.ndarray) -> np.ndarray:
        """Of documents with these digests, uint64 [n]: bool [n]."""
        chosen = digests < np.uint64(math.ceil(self.share * 2.0**64))
        return chosen if self.also is None else chosen | (digests == np.uint64(self.also))

    def holds_out(self, text: str) -> bool:
        return bool(self.held_out(np.array([digest(text)], np.uint64))[0])


def find_split(config: DataConfig, skip_bad: bool = False) -> Split:
    """Hold out the last document of a corpus so small that the hash holds out none. Raises DataError."""
    split = Split(config.held_out)
    if config.held_out == 0:
        return split
    first = last = None
    several = False
    for text in documents(config, skip_bad):
        if split.holds_out(text):
            return split
        last = digest(text)
        first = last if first is None else first
        several = several or last != first
    if not several:
        raise DataError(
            f"{name_of(config)} holds fewer than 2 different documents, one to train on and"
            " one to hold out; give more, or set ",
            "data.held_out",
            " to 0",
            where="data.held_out",
        )
    return Split(config.held_out, also=last)


@dataclass
class Counts:
    """What has become of the records so far."""

    read: int = 0
    """Documents: records with text, as max_documents counts them."""
    documents: dict[str, int] = field(default_factory=dict)
    """Written, by part."""
    tokens: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str | None = None
    complete: bool = False
    """Nothing more is to be read: the input ended, or a limit is reached."""


class Seen:
    """The digests met so far: sorted arrays that are merged when they become similar in size. About 8 bytes each, 16
    while the largest are merged."""

    def __init__(self, digests: np.ndarray) -> None:
        self._sorted = [np.sort(digests)] if len(digests) else []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Return which of these, uint64 [n], are met for the first time: bool [n]."""
        new = np.zeros(len(digests), bool)
        unique, first = np.unique(digests, return_index=True)
        known = np.zeros(len(unique), bool)
        for part in self._sorted:
            at = np.minimum(np.searchsorted(part, unique), len(part) - 1)
            known |= part[at] == unique
        new[first[~known]] = True
        if not known.all():
            self._sorted.append(unique[~known])
        while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]))
        return new


def tokenise(
    config: DataConfig,
    tokenizer: str,
    end_of_text: int | None,
    files: TokenFiles,
    split: Split | None = None,
    deduplicate: bool = False,
    skip_bad: bool = False,
    workers: int = 0,
) -> Counts:
    """Write the documents of a source into the parts `train` and, where some are held out, `held_out` of `files`.

    Until there are none, or `train` holds max_tokens and `held_out` a document, or max_documents are read. It goes on
    where `files` stands. `tokenizer`: the content of a tokenizer.json. `end_of_text`: id put after each document, None:
    none. `split`: None: found here. `deduplicate`: of identical documents only the first. `workers`: 0: in this
    process. Raises DataError, and OSError where `files` cannot be written.
    """
    if files.goes_on:
        split, counts = Split(config.held_out, files.notes["also"]), Counts(**files.notes["counts"])
    else:
        split, counts = split or find_split(config, skip_bad), Counts()
        counts.documents, counts.tokens = dict.fromkeys(files.parts, 0), dict.fromkeys(files.parts, 0)
    seen = Seen(files.digests()) if deduplicate else None
    begun_with = files.position
    positions: deque[dict[str, Any]] = deque()
    failures: list[DataError] = []

    def raw() -> Iterator[Chunk]:
        try:
            for chunk, position in chunks(config, begun_with):
                positions.append(position)
                yield chunk
        except DataError as error:  # kept until all before it is done: it may not matter any more
            failures.append(error)

    settings = (tokenizer, config.text_key, end_of_text, files.dtype, skip_bad)
    with ExitStack() as stack:
        progress = stack.enter_context(_Progress(config, begun_with))
        results: Iterator[Encoded]
        if counts.complete:
            results = iter(())
        elif workers:
            pool = stack.enter_context(WorkerPool(workers, encode, set_up, *settings))
            results = pool.map(raw())
        else:
            results = map(Encoder(*settings), raw())
        for encoded in results:
            _take(encoded, config, split, seen, counts, files, skip_bad)
            position = positions.popleft()
            files.advance(position, {"also": split.also, "counts": asdict(counts)})
            progress.show(position["bytes"], sum(counts.tokens.values()))
            if counts.complete:
                break
        else:
            if failures:
                raise failures[0]
            counts.complete = True
    if not sum(counts.documents.values()):
        raise DataError(f"{name_of(config)} holds no text", where="data.path")
    return counts


def _take(
    encoded: Encoded,
    config: DataConfig,
    split: Split,
    seen: Seen | None,
    counts: Counts,
    files: TokenFiles,
    skip_bad: bool,
) -> None:
    """Write what is wanted of a chunk. Raises its error if the record in question is wanted."""
    lengths, digests = encoded.lengths, encoded.digests
    wanted = np.ones(len(lengths), bool)
    if config.max_documents is not None:
        left = config.max_documents - counts.read
        wanted[left:] = False
        counts.complete = len(wanted) >= left
    counts.read += int(wanted.sum())
    held_out = split.held_out(digests)
    if seen is not None:
        # only of what is wanted: `seen` is then the same however the input was cut into chunks
        new = np.zeros_like(wanted)
        new[wanted] = seen.add(digests[wanted])
        counts.duplicates += int((wanted & ~new).sum())
        wanted = new
    unique = digests[wanted]
    if config.max_tokens is not None:
        of_train = lengths * (wanted & ~held_out)
        is_full = counts.tokens["train"] + np.cumsum(of_train) - of_train >= config.max_tokens  # before each document
        late = wanted & held_out & is_full
        wanted &= ~is_full
        if not counts.documents.get("held_out") and not (wanted & held_out).any() and late.any():
            wanted[int(late.argmax())] = True  # the one held-out document that was still missing
        full = counts.tokens["train"] + int((lengths * (wanted & ~held_out)).sum()) >= config.max_tokens
        some = not split.share or counts.documents["held_out"] > 0 or bool((wanted & held_out).any())
        counts.complete |= full and some
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
    if seen is not None:
        files.add_digests(unique)


class _Progress:
    """A bar with the time left on a terminal, else a line now and then. A context manager."""

    def __init__(self, config: DataConfig, position: dict[str, Any] | None) -> None:
        self._total = input_bytes(config)
        self._first = position["bytes"] if position else 0
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar = tqdm(
            desc="tokenising", total=self._total, initial=self._first, unit="B", unit_scale=True, disable=None
        )
        return self

    def show(self, read: int, tokens: int) -> None:
        """`read`: bytes of the input; `tokens`: written so far."""
        now = time.monotonic()
        self._bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        self._bar.update(read - self._bar.n)
        if self._bar.disable and now - self._said >= _SAY_EVERY:
            self._said = now
            line = f"tokenising: {tokens:,} tokens"
            if self._total and read > self._first:
                left = (now - self._begun) * (self._total - read) / (read - self._first)
                line += f", {read / self._total:.1%} of {self._total / 1e9:.2f} GB, {tqdm.format_interval(left)} left"
            say(line)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
