"""From a `DataConfig` to sequences of tokens: tokenise once, keep the result, open it on every rank.

T: tokens a sequence (data.sequence_length).
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from l2e_ds.config import DataConfig
from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.files import building
from l2e_ds.data.indexed import IndexedTokens, IndexedWriter, best_dtype
from l2e_ds.data.sources import check_source, documents, source_files
from l2e_ds.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer, vocabulary_size
from l2e_ds.errors import DataError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

META = "meta.json"
FORMAT = 1  # raise when the same configuration must give other files
# The fields of DataConfig that change what is stored; sequences are cut out of it later.
_STORED_FIELDS = (
    *("source", "subset", "split", "revision", "streaming", "text_key"),
    *("max_documents", "max_tokens", "tokenizer", "train_tokenizer", "held_out"),
)
_BATCH_CHARACTERS = 1 << 22  # text tokenised at once: enough for all cores, little enough for memory
_PIECE_CHARACTERS = 1 << 18  # a longer document is tokenised in pieces, on several cores
_TOKENIZER_CHARACTERS = 1 << 30  # more text hardly changes a vocabulary
_CUT = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True)
class PreparedData:
    """What a run reads. `directory` is the folder of the tokenised text, None for an indexed pair."""

    train: TokenDataset
    held_out: TokenDataset | None
    tokenizer: PreTrainedTokenizerFast | None
    train_tokens: int
    held_out_tokens: int
    directory: Path | None


def check_data(config: DataConfig, vocab_size: int) -> None:
    """The preflight: source and tokenizer are there, readable and fit the model. Writes nothing. Raises DataError."""
    check_source(config)
    if config.source == "indexed":
        prepared = _open_indexed(config, vocab_size)
        for part in (prepared.train, prepared.held_out):
            if part is not None:
                part.check_vocabulary()
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        _check_vocabulary(tokenizer, config, vocab_size)
        end_of_text_id(tokenizer)
    else:
        _check_trained_size(config, vocab_size)


def prepare_data(config: DataConfig, cache: Path, vocab_size: int) -> PreparedData:
    """Tokenise the source into `cache`, unless that was done before, and open it.

    Call it on rank 0 first and on the others after a barrier; simultaneous calls do no harm, only work twice.
    `vocab_size`: model.vocab_size. Raises DataError where source or tokenizer are broken, do not fit the model, or hold
    less than one sequence.
    """
    if config.source == "indexed":
        return _open_indexed(config, vocab_size)
    _check_trained_size(config, vocab_size)
    limit = config.max_tokens
    folder = Path(cache) / f"{config.source}-{_fingerprint(config)}"
    if not (folder / META).exists():
        try:
            with building(folder, proof=META) as temporary:
                _build(config, temporary, limit, vocab_size)
        except OSError as error:
            raise DataError(f"data.cache: cannot write {error.filename or folder}: {error.strerror or error}") from None
        logger.info("tokenised %s into %s", config.source, folder)
    return _open_prepared(config, folder, vocab_size)


def _fingerprint(config: DataConfig) -> str:
    """12 hex digits over all that decides what is stored: fields and local files."""
    stored: dict[str, Any] = {name: getattr(config, name) for name in _STORED_FIELDS}
    if config.source == "stdlib":
        files = source_files(config)
        stored["stdlib"] = [platform.python_version(), len(files), sum(path.stat().st_size for path in files)]
    else:
        stored["files"] = [_file_identity(path) for path in source_files(config)]
    if config.source == "hub":
        stored["path"] = config.path
    if config.tokenizer is not None:
        path = Path(config.tokenizer).expanduser()
        local = sorted(path.rglob("*")) if path.is_dir() else [path]
        stored["tokenizer_files"] = [_file_identity(file) for file in local if file.is_file()]
    stored["format"] = FORMAT
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:12]


def _file_identity(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


# --- training and held-out documents ----------------------------------------------------------------------------


def _digest(text: str) -> int:
    """64 bits of a document's content."""
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class _Split:
    """Which documents are held out. Decided by content, so that equal documents lie on the same side."""

    share: float
    also: int | None = None
    """Digest of a document that is held out although its hash says otherwise."""

    def held_out(self, text: str) -> bool:
        digest = _digest(text)
        return digest < self.share * 2**64 or digest == self.also


def _find_split(config: DataConfig) -> _Split:
    """Hold out the last document of a corpus so small that the hash holds out none. Raises DataError."""
    split = _Split(config.held_out)
    if config.held_out == 0:
        return split
    first = last = None
    several = False
    for text in documents(config):
        if split.held_out(text):
            return split
        last = _digest(text)
        first = last if first is None else first
        several = several or last != first
    if not several:
        raise DataError(
            f"data.held_out: {config.path or config.source} holds fewer than 2 different documents, one to train on and"
            " one to hold out; give more, or set data.held_out: 0"
        )
    return _Split(config.held_out, also=last)


# --- tokenising -------------------------------------------------------------------------------------------------


def _build(config: DataConfig, folder: Path, limit: int | None, vocab_size: int) -> None:
    split = _find_split(config)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_tokenizer(_tokenizer_texts(config, split, limit), int(config.train_tokenizer or 0))
    _check_vocabulary(tokenizer, config, vocab_size)
    dtype = best_dtype(vocabulary_size(tokenizer))
    with ExitStack() as stack:
        train = stack.enter_context(IndexedWriter(folder / "train", dtype))
        held_out = stack.enter_context(IndexedWriter(folder / "held_out", dtype)) if split.share else None
        _tokenise(config, split, tokenizer, limit, train, held_out)
    tokenizer.save_pretrained(folder / "tokenizer")
    writers = {"train": train} if held_out is None else {"train": train, "held_out": held_out}
    meta = {
        "documents": {name: writer.documents for name, writer in writers.items()},
        "tokens": {name: writer.tokens for name, writer in writers.items()},
        "vocabulary": vocabulary_size(tokenizer),
        "end_of_text": end_of_text_id(tokenizer),
        "dtype": train.dtype.name,
        "token_limit": limit,
        "data": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("datasets", "numpy", "tokenizers", "transformers")},
    }
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _tokenizer_texts(config: DataConfig, split: _Split, limit: int | None) -> Iterator[str]:
    """Training documents to learn a vocabulary from: not much more of them than will be tokenised."""
    left = _TOKENIZER_CHARACTERS if limit is None else min(_TOKENIZER_CHARACTERS, max(1 << 24, 8 * limit))
    for text in documents(config):
        if not split.held_out(text):
            yield text
            left -= len(text)
            if left <= 0:
                return


def _tokenise(
    config: DataConfig,
    split: _Split,
    tokenizer: PreTrainedTokenizerFast,
    limit: int | None,
    train: IndexedWriter,
    held_out: IndexedWriter | None,
) -> None:
    """Write documents until there are none, or `train` holds `limit` tokens and `held_out` a document."""

    def full() -> bool:
        return limit is not None and train.tokens >= limit

    def complete() -> bool:
        return full() and (held_out is None or held_out.documents > 0)

    def sided() -> Iterator[tuple[str, bool]]:
        for text in documents(config):
            if complete():
                return
            is_held_out, late = split.held_out(text), full()
            if is_held_out or not late:
                yield text, is_held_out
            if is_held_out and late:  # the one held-out document that was still missing
                return

    with tqdm(desc="tokenising", unit="token", unit_scale=True, disable=None) as bar:
        for tokens, is_held_out in _token_documents(sided(), tokenizer):
            if complete():
                return
            if is_held_out and held_out is not None:
                held_out.add(tokens)
            elif not full():
                train.add(tokens)
            bar.update(len(tokens))


def _token_documents(
    texts: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids of each document with end-of-text at its end, int64 [n], and the mark that came with the text."""
    # The Rust library encodes a batch on all cores. TOKENIZERS_PARALLELISM is left alone: unset means just this,
    # and forcing it to true would let a forked process wait for threads that it does not have.
    backend = tokenizer.backend_tokenizer
    end = np.array([end_of_text_id(tokenizer)], dtype=np.int64)
    parts: list[np.ndarray] = []
    marks: list[bool] = []

    def pieces() -> Iterator[tuple[str, bool]]:
        for text, mark in texts:
            marks.append(mark)
            cut = list(_pieces(text))
            yield from ((piece, i == len(cut) - 1) for i, piece in enumerate(cut))

    for batch in _batches(pieces()):
        encodings = backend.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        for (_, last), encoding in zip(batch, encodings, strict=True):
            parts.append(np.asarray(encoding.ids, dtype=np.int64))
            if last:
                yield np.concatenate([*parts, end]), marks.pop(0)
                parts.clear()


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text before a blank that follows a non-blank, where byte-level BPE has a boundary anyway."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and (cut := _CUT.search(text, start + _PIECE_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- opening ----------------------------------------------------------------------------------------------------


def _check_trained_size(config: DataConfig, vocab_size: int) -> None:
    if config.train_tokenizer is not None and config.train_tokenizer > vocab_size:
        raise DataError(f"data.train_tokenizer: got {config.train_tokenizer}, more than model.vocab_size {vocab_size}")


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: DataConfig, vocab_size: int) -> None:
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        key = "tokenizer" if config.tokenizer is not None else "train_tokenizer"
        name = f"{config.tokenizer} " if config.tokenizer is not None else ""
        raise DataError(f"data.{key}: {name}has {size} entries, more than model.vocab_size {vocab_size}")


def _open_prepared(config: DataConfig, folder: Path, vocab_size: int) -> PreparedData:
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    _check_vocabulary(tokenizer, config, vocab_size)

    def dataset(name: str) -> TokenDataset:
        indexed = IndexedTokens(folder / name)
        return TokenDataset(
            *(indexed.tokens, 0, indexed.num_tokens, config.sequence_length, vocab_size, indexed.name),
            documents=indexed,
        )

    return _checked(config, dataset("train"), dataset("held_out") if config.held_out else None, tokenizer, folder)


def _open_indexed(config: DataConfig, vocab_size: int) -> PreparedData:
    """Training documents in stored order; the last ones are held out. Limits count whole documents."""
    indexed = IndexedTokens(config.path or [])
    count = min(indexed.num_documents, config.max_documents or indexed.num_documents)
    kept = max(1, round(count * config.held_out)) if config.held_out else 0
    if kept >= count:
        raise DataError(
            f"data.held_out: {kept} of {count} documents of {indexed.name} leaves none to train on;"
            " give more documents, or lower data.held_out (0: none)"
        )
    split, stop = indexed.start(count - kept), indexed.start(count)
    train_stop = split
    if config.max_tokens is not None and config.max_tokens < split:
        stops = range(count - kept + 1)
        train_stop = indexed.start(bisect_left(stops, config.max_tokens, key=indexed.start))
    width = config.sequence_length + 1
    # Data stored as separate sequences: neighbours share no token.
    stride = width if indexed.all_documents_hold(width) else None

    def dataset(start: int, stop: int) -> TokenDataset:
        return TokenDataset(
            *(indexed.tokens, start, stop, config.sequence_length, vocab_size, indexed.name), stride, indexed
        )

    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    if tokenizer is not None:
        _check_vocabulary(tokenizer, config, vocab_size)
    return _checked(config, dataset(0, train_stop), dataset(split, stop) if kept else None, tokenizer, None)


def _checked(
    config: DataConfig,
    train: TokenDataset,
    held_out: TokenDataset | None,
    tokenizer: PreTrainedTokenizerFast | None,
    directory: Path | None,
) -> PreparedData:
    """Raises DataError where a part is too short for one sequence."""
    needed = config.sequence_length + 1
    if not len(train):
        raise DataError(
            f"data.sequence_length: the training documents of {config.path or config.source} hold {train.num_tokens}"
            f" tokens, a sequence needs {needed}; give more text or lower data.sequence_length"
        )
    if held_out is not None and not len(held_out):
        raise DataError(
            f"data.held_out: the held-out documents of {config.path or config.source} hold {held_out.num_tokens}"
            f" tokens, a sequence needs {needed}; raise data.held_out ({config.held_out}) or lower data.sequence_length"
        )
    tokens = 0 if held_out is None else held_out.num_tokens
    return PreparedData(train, held_out, tokenizer, train.num_tokens, tokens, directory)
