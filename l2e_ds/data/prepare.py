"""Prepare the data of a run: tokenize a source once, keep the result, and open it on every rank.

T: tokens a sequence (data.sequence_length).
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l2e_ds.config.sections import DataConfig
from l2e_ds.data.dataset import TokenDataset, token_dataset
from l2e_ds.data.indexed import IndexedTokens, best_dtype, pair, read_sidecar, write_pair
from l2e_ds.data.sources import check_source, documents, input_bytes, name_of, path_entries, source_files
from l2e_ds.data.stream import TokenStream
from l2e_ds.data.token_files import JOURNAL, LOCK, Exclusive, TokenFiles
from l2e_ds.data.tokenize import Split, check_split, find_split, tokenize
from l2e_ds.data.tokenizer import end_of_text_id, load_tokenizer, tokenizer_digest, train_tokenizer, vocabulary_size
from l2e_ds.data.workers import default_workers
from l2e_ds.errors import DataError
from l2e_ds.system.files import file_stamp, fsync_path, write_whole
from l2e_ds.system.provenance import versions

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

META = "meta.json"
FORMAT = 2  # increase it when the same configuration must give other files
# The fields of DataConfig that change what is stored. Sequences are cut out of it later.
_STORED_FIELDS = (
    *("source", "subset", "split", "revision", "text_key"),
    *("max_documents", "max_tokens", "tokenizer", "train_tokenizer", "held_out"),
)
_SMALL_BYTES = 1 << 26  # smaller inputs are tokenized in this process
_TOKENIZER_CHARACTERS = 1 << 30  # a vocabulary hardly changes with more text


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, or of one set of a mixture, ready to be read.

    train: None for a stream, whose configuration is `stream`. directory: the folder of the tokenized text; None for a
    stream or an indexed set. name, weight: those of a set of a mixture.
    """

    train: TokenDataset | None
    held_out: TokenDataset | None = None
    tokenizer: PreTrainedTokenizerFast | None = None
    directory: Path | None = None
    name: str = ""
    weight: float = 1.0
    stream: DataConfig | None = None

    @property
    def train_tokens(self) -> int | None:
        return None if self.train is None else self.train.num_tokens

    @property
    def held_out_tokens(self) -> int:
        return 0 if self.held_out is None else self.held_out.num_tokens


def tokenizer_of(sets: Sequence[PreparedData]) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of a run's sets, or None if none of them has one."""
    return next((part.tokenizer for part in sets if part.tokenizer is not None), None)


@dataclass(frozen=True)
class PreparedText:
    """A text that a run evaluates and does not train on.

    name: its name in `evaluation.texts`. dataset: its sequences. num_bytes: how long its documents are in UTF-8.
    """

    name: str
    dataset: TokenDataset
    num_bytes: int

    @property
    def evaluated_tokens(self) -> int:
        """The number of tokens that are predicted: all but the first, and those too few for one more sequence."""
        return len(self.dataset) * self.dataset.sequence_length

    def bits_per_byte(self, loss: float) -> float:
        """Return, in bits per byte, a loss that is given in nats per token.

        That is the loss times log2(e) times the tokens per byte. All tokens of the text are counted, with the
        end-of-text behind each document (Gao et al. 2020, The Pile, 3.1).
        """
        return loss / math.log(2) * self.dataset.num_tokens / self.num_bytes


def check_data(config: DataConfig, vocab_size: int) -> None:
    """Raise DataError if source or tokenizer are missing, unreadable or do not fit the model. Writes nothing."""
    check_source(config)
    check_split(config)
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


def check_tokenizers(config: DataConfig) -> None:
    """Raise DataError if the token files of a run were not all made with one tokenizer, data.tokenizer if that is set.

    This is known from each PREFIX.json.
    """
    found: list[tuple[str, str, str]] = []  # digest, key, and where the digest comes from
    for index, (_, _, part) in enumerate(config.all_sets()):
        key = "data.path" if config.sets is None else f"data.sets.{index}.path"
        for prefix in (*path_entries(part), *_held_out_prefixes(part)) if part.source == "indexed" else ():
            sidecar = read_sidecar(prefix)
            if digest := sidecar.get("tokenizer_digest"):
                name = f"{sidecar.get('tokenizer')} (SHA-256 {str(digest)[:12]})"
                found.append((digest, key, f"{prefix} was tokenized with {name}"))
    if found and config.tokenizer is not None:
        digest = tokenizer_digest(load_tokenizer(config.tokenizer))
        found.insert(0, (digest, "", f"data.tokenizer is {config.tokenizer} (SHA-256 {digest[:12]})"))
    for digest, key, origin in found:
        if digest != found[0][0]:
            raise DataError(f"{key}: {origin}, but {found[0][2]}: all sets of a run must be of one tokenizer")


def prepare_data(config: DataConfig, cache: Path, vocab_size: int) -> PreparedData:
    """Tokenize the source into `cache`, unless that was done before, and open it.

    Call it on rank 0 first and on the others after a barrier. Of several simultaneous calls one works and the others
    wait. A call after a kill resumes.

    vocab_size: model.vocab_size. Raises DataError if source or tokenizer are broken, do not fit the model, or hold less
    than one sequence.
    """
    if config.source == "indexed":
        return _open_indexed(config, vocab_size)
    _check_trained_size(config, vocab_size)
    folder = _tokenized_folder(config, cache, vocab_size)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    _check_vocabulary(tokenizer, config, vocab_size)
    train = _own_sequences(config, folder / "train", vocab_size)
    held_out = _own_sequences(config, folder / "held_out", vocab_size) if config.held_out else None
    return _prepared_data(config, train, held_out, tokenizer, folder)


def prepare_text(config: DataConfig, cache: Path, vocab_size: int, name: str) -> PreparedText:
    """Prepare a text source without held-out documents for evaluation.

    Call it as `prepare_data`. Raises DataError.
    """
    folder = _tokenized_folder(config, cache, vocab_size)
    dataset = _own_sequences(config, folder / "train", vocab_size)
    _check_length(config, dataset, f"{name_of(config)} holds", "data.path", "give more text")
    counted = folder / "bytes"  # a file of its own, as the folder may be that of a training set
    if not counted.exists():
        written = json.loads((folder / META).read_text(encoding="utf-8"))["documents"]["train"]
        with _cache_errors(counted):
            write_whole(counted, str(sum(len(text.encode()) for text in islice(documents(config), written))))
    return PreparedText(name, dataset, int(counted.read_text()))


def _tokenized_folder(config: DataConfig, cache: Path, vocab_size: int) -> Path:
    """Return the folder of a tokenized text source, after tokenizing it if that was not done before."""
    folder = Path(cache) / f"{config.source}-{_fingerprint(config)}"
    if not (folder / META).exists():
        with _cache_errors(folder):
            _build_exclusively(config, folder, vocab_size)
    return folder


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a DataError about data.cache."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write {error.filename or path}: {error.strerror or error}"
        raise DataError(problem, where="data.cache") from None


def _build_exclusively(config: DataConfig, folder: Path, vocab_size: int) -> None:
    """Make `folder`, or wait for another process that makes it."""
    with Exclusive(folder.with_name(f"{folder.name}.partial"), wait=True) as own:
        if (folder / META).exists():
            own.remove()
            return
        if not (own.folder / META).exists():
            _build(config, own.folder, vocab_size)
        shutil.rmtree(folder, ignore_errors=True)  # it has no META, so it is incomplete
        own.folder.rename(folder)  # moves the lock, too, so that waiting processes see that it is gone
        for path in folder.iterdir():
            if path.name in (JOURNAL, LOCK, "digests") or path.suffix == ".lengths":
                path.unlink()
        fsync_path(folder.parent)


def prepare_stream(config: DataConfig, cache: Path, vocab_size: int, evaluated: int) -> PreparedData:
    """Prepare a stream: tokenize only the first held-out documents into `cache`, enough for `evaluated` sequences.

    Call it as `prepare_data`. Raises DataError.
    """
    tokenizer = load_tokenizer(str(config.tokenizer))
    _check_vocabulary(tokenizer, config, vocab_size)
    if not config.held_out:
        return PreparedData(None, None, tokenizer, stream=config)
    needed = evaluated * config.sequence_length + 1
    prefix = Path(cache) / f"stream-{_fingerprint(config)}-{needed}"
    if not prefix.with_name(f"{prefix.name}.idx").exists():  # the file that is written last
        stream = TokenStream(config, tokenizer, config.sequence_length, seed=0, workers=0)
        tokens = stream.held_out(needed)
        stream.close()
        with _cache_errors(prefix):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            write_pair(prefix, [tokens], best_dtype(vocabulary_size(tokenizer)))
    held_out = _own_sequences(config, prefix, vocab_size)
    _check_held_out(config, held_out)
    return PreparedData(None, held_out, tokenizer, stream=config)


def _fingerprint(config: DataConfig) -> str:
    """Return 12 hex digits that depend on all that decides what is stored: fields and local files."""
    stored: dict[str, Any] = {name: getattr(config, name) for name in _STORED_FIELDS}
    if config.source == "stdlib":
        files = source_files(config)
        stored["stdlib"] = [platform.python_version(), len(files), sum(path.stat().st_size for path in files)]
    else:
        stored["files"] = [file_stamp(path) for path in source_files(config)]
    if config.source == "hub":
        stored["path"] = config.path
    if config.tokenizer is not None:
        path = Path(config.tokenizer).expanduser()
        local = sorted(path.rglob("*")) if path.is_dir() else [path]
        stored["tokenizer_files"] = [file_stamp(file) for file in local if file.is_file()]
    stored["format"] = FORMAT
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:12]


# --- tokenizing -------------------------------------------------------------------------------------------------


def _build(config: DataConfig, folder: Path, vocab_size: int) -> None:
    """Fill a folder that this process alone works in. Resumes where a killed process left it."""
    resumes = (folder / JOURNAL).exists()
    split = None if resumes else find_split(config)
    if split is None:
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_tokenizer(_tokenizer_texts(config, split), int(config.train_tokenizer or 0))
    _check_vocabulary(tokenizer, config, vocab_size)
    end_of_text = end_of_text_id(tokenizer)
    if not resumes:
        tokenizer.save_pretrained(folder / "tokenizer")
        for path in (folder / "tokenizer").iterdir():
            fsync_path(path)
    parts = ["train", "held_out"] if config.held_out else ["train"]
    dtype = np.dtype(best_dtype(vocabulary_size(tokenizer))).newbyteorder("<")
    with TokenFiles(folder, parts, dtype, asked={}) as files:
        backend = tokenizer.backend_tokenizer.to_str()
        counts = tokenize(config, backend, end_of_text, files, split, workers=_workers(config))
        files.finish()
    meta = {
        "documents": counts.documents,
        "tokens": counts.tokens,
        "vocabulary": vocabulary_size(tokenizer),
        "end_of_text": end_of_text,
        "dtype": dtype.name,
        "token_limit": config.max_tokens,
        "data": config.model_dump(mode="json"),
        "versions": versions("python", "datasets", "numpy", "tokenizers", "transformers"),
    }
    write_whole(folder / META, json.dumps(meta, indent=2) + "\n")


def _workers(config: DataConfig) -> int:
    """Return how many processes tokenize: 0, which is this one, for an input that is done before they have started."""
    size = input_bytes(config)
    if config.max_tokens is not None:
        size = min(4 * config.max_tokens, size or 4 * config.max_tokens)
    return 0 if size is not None and size < _SMALL_BYTES else config.workers or default_workers()


def _tokenizer_texts(config: DataConfig, split: Split) -> Iterator[str]:
    """Yield the training documents from which to learn a vocabulary, not many more than will be tokenized."""
    limit = config.max_tokens
    left = _TOKENIZER_CHARACTERS if limit is None else min(_TOKENIZER_CHARACTERS, max(1 << 24, 8 * limit))
    for text in documents(config):
        if not split.holds_out(text):
            yield text
            left -= len(text)
            if left <= 0:
                return


# --- opening ----------------------------------------------------------------------------------------------------


def _check_trained_size(config: DataConfig, vocab_size: int) -> None:
    if config.train_tokenizer is not None and config.train_tokenizer > vocab_size:
        raise DataError(
            f"got {config.train_tokenizer}, allowed: up to model.vocab_size, which is {vocab_size}",
            where="data.train_tokenizer",
        )


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: DataConfig, vocab_size: int) -> None:
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        key = "tokenizer" if config.tokenizer is not None else "train_tokenizer"
        name = f"{config.tokenizer} " if config.tokenizer is not None else ""
        raise DataError(
            f"{name}has {size} entries, more than model.vocab_size {vocab_size}; raise that, or take a smaller one",
            where=f"data.{key}",
        )


def _own_sequences(config: DataConfig, prefix: Path, vocab_size: int) -> TokenDataset:
    """Return the sequences of token files that `_build` or `prepare_stream` wrote."""
    return token_dataset(IndexedTokens(prefix), config.sequence_length, vocab_size, packed=True)


def _held_out_prefixes(config: DataConfig) -> list[str]:
    """Return what `l2e-ds tokenize --held-out` wrote beside an indexed set, if it is there for every prefix."""
    beside = [f"{pair(prefix)[1].with_suffix('')}_held_out" for prefix in path_entries(config)]
    return beside if config.held_out and all(pair(prefix)[1].is_file() for prefix in beside) else []


def _open_indexed(config: DataConfig, vocab_size: int) -> PreparedData:
    """Open an indexed set, with its documents in stored order.

    The held-out text is the set beside it (`_held_out_prefixes`), or else its last documents. max_documents counts
    training and last documents, max_tokens the tokens of whole training documents.
    """
    indexed = IndexedTokens(path_entries(config))
    beside = IndexedTokens(prefixes) if (prefixes := _held_out_prefixes(config)) else None
    count = min(indexed.num_documents, config.max_documents or indexed.num_documents)
    held_out_count = max(1, round(count * config.held_out)) if config.held_out and beside is None else 0
    train_count = count - held_out_count
    if train_count <= 0:
        raise DataError(
            f"{held_out_count} of {count} documents of {indexed.name} leaves none to train on; give more documents,"
            " or lower ",
            "data.held_out",
            " (0: none)",
            where="data.held_out",
        )
    train_stop = split = indexed.start(train_count)
    if config.max_tokens is not None and config.max_tokens < split:
        train_stop = indexed.start(bisect_left(range(train_count + 1), config.max_tokens, key=indexed.start))
    sizes = (config.sequence_length, vocab_size)
    held_out = token_dataset(indexed, *sizes, split, indexed.start(count)) if held_out_count else None
    if beside is not None:
        held_out = token_dataset(beside, *sizes)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    if tokenizer is not None:
        _check_vocabulary(tokenizer, config, vocab_size)
    return _prepared_data(config, token_dataset(indexed, *sizes, stop=train_stop), held_out, tokenizer, None)


def _prepared_data(
    config: DataConfig,
    train: TokenDataset,
    held_out: TokenDataset | None,
    tokenizer: PreTrainedTokenizerFast | None,
    directory: Path | None,
) -> PreparedData:
    """Return the prepared data. Raises DataError if training or held-out text are too short for one sequence."""
    what = f"the training documents of {name_of(config)} hold"
    _check_length(config, train, what, "data.sequence_length", "give more text")
    if held_out is not None:
        _check_held_out(config, held_out)
    return PreparedData(train, held_out, tokenizer, directory)


def _check_held_out(config: DataConfig, held_out: TokenDataset) -> None:
    """Raise DataError if the held-out text is too short for one sequence."""
    advice: tuple[str, ...] = ("raise ", "data.held_out", f" ({config.held_out})")
    if config.source == "indexed" and _held_out_prefixes(config):
        advice = (f"hold out more in {held_out.name}",)
    _check_length(config, held_out, f"the held-out documents of {name_of(config)} hold", "data.held_out", *advice)


def _check_length(config: DataConfig, dataset: TokenDataset, what: str, where: str, *advice: str) -> None:
    """Raise DataError if a dataset is too short for one sequence. what: its name and a verb."""
    if not len(dataset):
        problem = f"{what} {dataset.num_tokens} tokens, a sequence needs {config.sequence_length + 1}; "
        raise DataError(problem, *advice, " or lower data.sequence_length", where=where)
