"""Pack sequences from a stream of documents that is tokenized while it is read, without preparing anything on disk.

Documents are read in blocks of `shuffle_buffer`. Each block is shuffled by (seed, epoch, number of the block). The
state of a stream is where the block begins in the source, how many of its documents are used up, and how many tokens
of the next one are. Resuming therefore reads one block again, tokenizes one document again, and gives the same
sequences to the token. (The shuffle buffer of `datasets` loses the documents that are in it.)

T: tokens a sequence, n: sequences asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from l2e_ds.config.sections import DataConfig
from l2e_ds.data.encode import Encoded, Encoder
from l2e_ds.data.indexed import best_dtype
from l2e_ds.data.sources import Chunk, Position, Record, chunks, documents, name_of, source_files
from l2e_ds.data.tokenize import find_split
from l2e_ds.data.tokenizer import end_of_text_id, tokenizer_digest, vocabulary_size
from l2e_ds.data.workers import WorkerPool
from l2e_ds.errors import DataError, L2EError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

_UNSHUFFLED = 256  # documents of a block without shuffling; resuming reads up to this many again
_BATCH_CHARACTERS = 1 << 17  # text that a worker takes at once, about 30 ms of work
# The fields of DataConfig that decide which documents a stream gives.
_FIELDS = ("source", "subset", "split", "revision", "text_key", "max_documents", "held_out")


@dataclass(frozen=True)
class _Block:
    """Where a block of documents begins."""

    epoch: int = 0
    number: int = 0
    """How many blocks of this epoch come before it."""
    position: Position | None = None
    """Position in the source before the chunk that holds the block's first document; None is the beginning."""
    records: int = 0
    """How many records of that chunk come before the block."""
    documents: int = 0
    """How many documents with text come before it in this epoch, which is what `max_documents` counts."""


@dataclass(frozen=True)
class _Mark:
    """A place in a stream: the block, how many documents of its order are used, and tokens used of the next one."""

    block: _Block
    used: int
    offset: int


class TokenStream:
    """The sequences of a text source, epoch after epoch without end. For one process, which closes it at the end.

    The training documents, each with end-of-text behind it, make one row of tokens, which continues over the ends of
    epochs. Sequence i is its tokens i*T to (i+1)*T, both included, as in `TokenDataset`. The sequences do not depend on
    the number of `workers` (processes that tokenize; 0: this one), nor on how many are asked for at once.
    shuffle_buffer: by default data.shuffle_buffer; 0 keeps the source's order.

    Raises DataError if the source is missing, broken (with file:line or row) or holds no text to train on.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        sequence_length: int,
        seed: int,
        workers: int,
        shuffle_buffer: int | None = None,
    ) -> None:
        self.name, self.sequence_length, self.seed = name_of(config), sequence_length, seed
        self.shuffle_buffer = config.shuffle_buffer if shuffle_buffer is None else shuffle_buffer
        self._split = find_split(config)
        self._files = source_files(config)
        if config.source not in ("hub", "stdlib"):  # a file that is added or removed later must not move the others
            config = config.model_copy(update={"path": [str(path) for path in self._files]})
        self.config = config
        self._end = end_of_text_id(tokenizer)
        dtype = np.dtype(best_dtype(vocabulary_size(tokenizer)))
        arguments = (tokenizer.backend_tokenizer.to_str(), config.text_key, self._end, dtype, False)
        self._encoder = Encoder(*arguments)
        self._pool: WorkerPool[Chunk, Encoded] = WorkerPool(workers, Encoder, *arguments)
        parts: dict[str, Any] = {name: getattr(config, name) for name in _FIELDS}
        parts["files"] = [(path.name, path.stat().st_size) for path in self._files]
        if config.source == "hub" and not self._files:
            parts["path"] = config.path
        parts["tokenizer"] = [self._end, sorted(tokenizer.get_vocab().items())]
        parts["order"] = [self.seed, self.shuffle_buffer]
        self._fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self._tokenizer = tokenizer_digest(tokenizer)
        self._go_to(_Mark(_Block(), 0, 0))

    def take(self, n: int) -> np.ndarray:
        """Return the next n sequences, int64 [n, T+1].

        An exception leaves the stream where it was before the call. Raises DataError and WorkerError.
        """
        before = self._mark()
        try:
            return self._take(n)
        except BaseException:
            self._go_to(before)
            self._pool.close()  # a pool that lost a worker cannot be used again
            raise

    def held_out(self, at_most: int) -> np.ndarray:
        """Return tokens of the first held-out documents, int64 [m], m <= `at_most`, whatever was taken before."""
        parts, missing = [np.empty(0, dtype=np.int64)], at_most
        texts = documents(self.config) if self._split.share else iter(())
        for text in filter(self._split.holds_out, texts):
            parts.append(self._encoder(partial(_records, [text])).tokens.astype(np.int64))
            missing -= len(parts[-1])
            if missing <= 0:  # checked here, as finding the next one may take long
                break
        return np.concatenate(parts)[:at_most]

    def state(self) -> dict[str, Any]:
        """Return the position after what was taken, for `restore`. It can be written as JSON and is below 1 KB."""
        return {"fingerprint": self._fingerprint, "tokenizer": self._tokenizer, **asdict(self._mark())}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a `state()`, also with another sequence length. Raises DataError if another stream made it."""
        if (state["fingerprint"], state["tokenizer"]) != (self._fingerprint, self._tokenizer):
            raise DataError(
                "data: the checkpoint is from another stream: data.*, names or sizes of its files, the tokenizer or"
                " training.seed have changed; give the same again, or start a new run"
            )
        self._go_to(_Mark(_Block(**state["block"]), state["used"], state["offset"]))

    def fingerprint(self) -> str:
        """Return 16 hex digits of what decides the sequences: fields, names and sizes of files, vocabulary, seed."""
        return self._fingerprint

    def close(self) -> None:
        """End the worker processes and keep the position. A later `take` starts the processes again."""
        self._go_to(self._mark())
        self._pool.close()

    # --- from documents to sequences ----------------------------------------------------------------------------

    def _mark(self) -> _Mark:
        if self._ready:
            block, used, _ = self._ready[0]
            return _Mark(block, used, self._offset)
        return self._begin

    def _go_to(self, mark: _Mark) -> None:
        self._begin = mark
        self._results: Iterator[tuple[_Block, int, np.ndarray]] | None = None
        self._ready: deque[tuple[_Block, int, np.ndarray]] = deque()  # documents with tokens not yet taken
        self._offset = mark.offset  # tokens taken of the first of them

    def _take(self, n: int) -> np.ndarray:
        width = self.sequence_length + 1
        if n < 1:
            return np.empty((0, width), dtype=np.int64)
        if self._results is None:
            self._results = self._tokenized_documents(self._begin)
        needed = n * self.sequence_length + 1
        available = sum(len(tokens) for *_, tokens in self._ready) - self._offset
        while available < needed:
            self._ready.append(next(self._results))
            available += len(self._ready[-1][2]) - (self._offset if len(self._ready) == 1 else 0)
        first, *others = (tokens for *_, tokens in self._ready)
        if len(first) <= self._offset:
            raise self._changed()
        flat = np.concatenate([first[self._offset : self._offset + needed], *others])[:needed]
        rows = np.lib.stride_tricks.sliding_window_view(flat, width)[:: self.sequence_length].astype(np.int64)
        self._offset += n * self.sequence_length
        while self._offset >= len(self._ready[0][2]):  # the last target stays, as the first input of the next sequence
            self._offset -= len(self._ready.popleft()[2])
        return rows

    def _tokenized_documents(self, mark: _Mark) -> Iterator[tuple[_Block, int, np.ndarray]]:
        """Yield every document from `mark` on: its block, its place in the block's order and its tokens, [n]."""
        submitted: deque[tuple[_Block, int]] = deque()  # first document of each batch that the workers have

        def batches() -> Iterator[Chunk]:
            texts: list[str] = []
            characters = 0
            try:
                for block, place, text in self._shuffled(mark):
                    if texts and (characters >= _BATCH_CHARACTERS or block is not submitted[-1][0]):
                        yield partial(_records, texts)
                        texts, characters = [], 0
                    if not texts:
                        submitted.append((block, place))
                    texts.append(text)
                    characters += len(text)
            except L2EError:  # raised after all that was read before it
                if texts:
                    yield partial(_records, texts)
                raise

        for encoded in self._pool.map(batches()):
            block, first = submitted.popleft()
            ends = np.cumsum(encoded.lengths)
            for place, tokens in enumerate(np.split(encoded.tokens, ends[:-1]), first):
                yield block, place, tokens

    def _shuffled(self, mark: _Mark) -> Iterator[tuple[_Block, int, str]]:
        """Yield the training documents from `mark` on, in the order in which they are trained on, without end.

        An error in a block is raised when the block begins.
        """
        used = mark.used
        for number, (block, texts) in enumerate(self._blocks(mark.block)):
            if used >= len(texts) or (number == 0 and block != mark.block):
                raise self._changed()
            order = self._order(block, len(texts))
            for place in range(used, len(texts)):
                yield block, place, texts[order[place]]
                texts[order[place]] = ""  # frees its memory for the next block
            used = 0

    def _order(self, block: _Block, size: int) -> np.ndarray:
        """Return a permutation of a block, int64 [size]: the order of random 64-bit numbers from the block's key."""
        if not self.shuffle_buffer:
            return np.arange(size)
        # A bit generator's raw output is the same in every version of NumPy; Generator.permutation's need not be.
        random = np.random.Philox(
            key=np.array([self.seed, block.epoch], np.uint64), counter=np.array([0, 0, 0, block.number], np.uint64)
        )
        return np.argsort(random.random_raw(size), kind="stable")

    def _blocks(self, block: _Block) -> Iterator[tuple[_Block, list[str]]]:
        """Yield the blocks from `block` on, each with its training documents in the source's order, without end."""
        size = self.shuffle_buffer or _UNSHUFFLED
        while True:
            texts: list[str] = []
            for text, position, records, found in self._texts(block):
                if not self._split.holds_out(text):
                    texts.append(text)
                if len(texts) == size:
                    yield block, texts
                    block, texts = _Block(block.epoch, block.number + 1, position, records, found), []
            if texts:
                yield block, texts
            elif block.number == 0:
                raise DataError(f"{self.name} holds no text to train on", where="data.path")
            block = _Block(block.epoch + 1)

    def _texts(self, block: _Block) -> Iterator[tuple[str, Position | None, int, int]]:
        """Yield the texts up to the end of the epoch, each with position, records and documents of a block after it."""
        position, skipped, found = block.position, block.records, block.documents
        for chunk, position_after in chunks(self.config, position):
            for number, record in enumerate(islice(chunk(self.config.text_key), skipped, None), skipped + 1):
                if found == self.config.max_documents:
                    return
                if isinstance(record, DataError):
                    raise record
                if record.strip():
                    found += 1
                    yield record, position, number, found
            position, skipped = position_after, 0

    def _changed(self) -> DataError:
        return DataError(
            f"{self.name} ends before the place where the stream left off: it has changed", where="data.path"
        )


def _records(texts: list[str], key: str) -> Iterator[Record]:
    """Yield documents that are in memory, as a chunk of a source does."""
    yield from texts
