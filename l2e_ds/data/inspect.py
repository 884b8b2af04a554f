"""Inspect token files: `l2e-ds data check` verifies a .bin/.idx set, `l2e-ds data show` prints the batch of a step.

T: tokens a sequence. G: sequences a global batch.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from l2e_ds.config.reading import find_file, load_run_config, read_deepspeed_json
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import at_least, say, warn
from l2e_ds.data.dataset import TokenDataset, token_dataset
from l2e_ds.data.indexed import IndexedTokens, pair, read_sidecar
from l2e_ds.data.mixture import TrainingSequences, prepare_sets
from l2e_ds.data.prepare import PreparedData, tokenizer_of
from l2e_ds.data.tokenizer import find_end_of_text, load_tokenizer, vocabulary_size
from l2e_ds.errors import ConfigError, DataError, renaming

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

_CHUNK = 1 << 20  # tokens that are read at once
_COUNTED = 1 << 24  # ids from here on are not counted one by one, which would take too much memory
_TOKENS_PER_LINE = 16


# --- what is known about a set ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What is known about a set's tokens, from options or else from PREFIX.json, which `l2e-ds tokenize` writes."""

    vocab_size: int | None = None
    end_of_text: int | None = None
    tokenizer: str | None = None


def read_known(
    prefix: str, indexed: IndexedTokens, vocab_size: int | None, tokenizer: str | None, end_of_text: int | None
) -> Known:
    """Return what options and PREFIX.json say about a set.

    Raises DataError if PREFIX.json is broken or belongs to another set, or if the tokenizer cannot be loaded.
    """
    path, sidecar = pair(prefix)[0].with_suffix(".json"), read_sidecar(prefix)
    for key, actual in (("documents", indexed.num_documents), ("tokens", indexed.num_tokens)):
        if sidecar.get(key, actual) != actual:
            raise DataError(f"{path}: says {sidecar[key]} {key}, but {indexed.idx_path} has {actual}")
    size, end = sidecar.get("vocabulary"), sidecar.get("end_of_text")
    if not all(number is None or isinstance(number, int) for number in (size, end)):
        raise DataError(f"{path}: vocabulary and end_of_text must be integers, got {size!r} and {end!r}")
    if tokenizer is not None:
        loaded = _load(tokenizer)
        size, end = vocabulary_size(loaded), find_end_of_text(loaded)
    size = size if vocab_size is None else at_least("--vocab-size", vocab_size, 1)
    end = end if end_of_text is None else at_least("--end-of-text", end_of_text, 0)
    if size is not None and end is not None and end >= size:
        raise DataError(f"{prefix}: end-of-text is id {end}, but the vocabulary has ids 0 to {size - 1}")
    return Known(size, end, tokenizer or sidecar.get("tokenizer"))


def _load(tokenizer: str) -> PreTrainedTokenizerFast:
    with renaming({"data.tokenizer": "--tokenizer"}):
        return load_tokenizer(tokenizer)


# --- check ------------------------------------------------------------------------------------------------------


def check(prefixes: Sequence[str], vocab_size: int | None, tokenizer: str | None, end_of_text: int | None) -> int:
    """Verify each set completely and print its statistics. Raises DataError for the first defect."""
    for prefix in prefixes:
        indexed = IndexedTokens(prefix)
        known = read_known(prefix, indexed, vocab_size, tokenizer, end_of_text)
        print(f"{prefix}: no defect found", *examine(indexed, known), sep="\n")
    return 0


def examine(indexed: IndexedTokens, known: Known) -> list[str]:
    """Read all of a set, in constant memory, and return lines that describe it. Raises DataError for the first defect.

    Quartiles are the smallest lengths that at least a quarter (half, three quarters) of the documents do not exceed.
    """
    with _bar("index", indexed.num_sequences, "sequence") as bar:
        indexed.check_index(bar.update)
    # how many documents have each length: few different numbers, however many documents there are
    counter: Counter[int] = Counter()
    for chunk in indexed.lengths_in_chunks():
        for length, count in zip(*np.unique(chunk, return_counts=True), strict=True):
            counter[int(length)] += int(count)
    with _bar("tokens", indexed.num_tokens, "token") as bar:
        counts, largest = _id_counts(indexed, known.vocab_size, bar.update)
    documents, lengths = indexed.num_documents, sorted(counter) or [0]
    at_most = np.cumsum([counter[length] for length in lengths])  # documents of at most each length
    quartiles = [lengths[np.searchsorted(4 * at_most, quarters * documents)] for quarters in (1, 2, 3)]
    vocabulary = f", of {known.vocab_size:,} in the vocabulary" if known.vocab_size is not None else ""
    used = f"{np.count_nonzero(counts):,} different ids, largest {largest}{vocabulary}"
    if largest >= _COUNTED:
        used = f"ids up to {largest:,}, too large to be counted"
    ends = "id not known"
    if known.end_of_text is not None and known.end_of_text < _COUNTED:
        ends = f"{counts[known.end_of_text : known.end_of_text + 1].sum():,} (id {known.end_of_text})"
    rows = {
        "files": f"{len(indexed.files)} .bin, {indexed.dtype.name}",
        "documents": f"{documents:,}, {counter[0]:,} of them empty",
        "tokens": f"{indexed.num_tokens:,}",
        "tokens a document": f"least {lengths[0]:,}, quartiles {', '.join(f'{length:,}' for length in quartiles)},"
        f" mean {indexed.num_tokens / max(1, documents):,.1f}, most {lengths[-1]:,}",
        "vocabulary used": used if indexed.num_tokens else "none",
        "end-of-text": ends,
    }
    return [f"  {label:<17}  {value}" for label, value in rows.items()]


def _bar(what: str, total: int, unit: str) -> tqdm:
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None, leave=False, dynamic_ncols=True)


def _id_counts(
    indexed: IndexedTokens, vocab_size: int | None, advance: Callable[[int], object]
) -> tuple[np.ndarray, int]:
    """Return how often each id below _COUNTED occurs, int64, and the largest id, or -1 if there is none."""
    counts, largest = np.zeros(0, dtype=np.int64), -1
    for path, first, ids in _token_chunks(indexed):
        chunk_largest = int(ids.max())
        if ids.min() < 0 or (vocab_size is not None and chunk_largest >= vocab_size):
            end = chunk_largest + 1 if vocab_size is None else vocab_size
            at = int(np.flatnonzero((ids < 0) | (ids >= end))[0])
            allowed = "ids are >= 0" if vocab_size is None else f"the vocabulary has ids 0 to {vocab_size - 1}"
            raise DataError(f"{path}: token id {ids[at]} at position {first + at}, but {allowed}")
        largest = max(largest, chunk_largest)
        chunk_counts = np.bincount(ids if chunk_largest < _COUNTED else ids[ids < _COUNTED], minlength=len(counts))
        chunk_counts[: len(counts)] += counts
        counts = chunk_counts
        advance(len(ids))
    return counts, largest


def _token_chunks(indexed: IndexedTokens) -> Iterator[tuple[Path, int, np.ndarray]]:
    """Yield (file, position in it, ids), read and not mapped: pages of a mapped file count as this process's memory."""
    for path, part in indexed.files:
        try:
            with open(path, "rb") as file:
                for first in range(0, len(part), _CHUNK):
                    count = min(_CHUNK, len(part) - first)
                    ids = np.fromfile(file, indexed.dtype, count)
                    if len(ids) < count:
                        raise DataError(f"{path}: became shorter while it was read")
                    yield path, first, ids
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


# --- show -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """The batches of a run, and what is needed to print them as text. steps: training.steps, or None for a set."""

    sequences: TrainingSequences
    tokenizer: PreTrainedTokenizerFast | None
    end_of_text: int | None
    steps: int | None = None

    def dataset(self, index: int) -> TokenDataset:
        """Return the training text of one of the sets, none of which is a stream."""
        dataset = self.sequences.sets[index].train
        assert dataset is not None
        return dataset


def view_of_run(run_file: str) -> View:
    """Return a run's data as training reads it. Text that is not yet tokenized for this run is tokenized now.

    Raises ConfigError and DataError.
    """
    from l2e_ds.models.pythia import network_config  # takes seconds, as it imports torch

    config = load_run_config(run_file)
    _check_batch(config, run_file)
    hf_config = network_config(config.model, config.data.sequence_length)
    if any(part.streaming for _, _, part in config.data.all_sets()):
        raise ConfigError(f"{run_file}: data.streaming: a stream can only be read in order; no step of it can be shown")
    sets = prepare_sets(config.data, config.data_cache, hf_config.vocab_size, config.training.evaluation_sequences)
    tokenizer = tokenizer_of(sets)
    end = None if tokenizer is None else find_end_of_text(tokenizer)
    training = config.training
    sequences = TrainingSequences(sets, training.global_batch, training.seed, config.data.order)
    return View(sequences, tokenizer, end, training.steps)


def _check_batch(config: RunConfig, run_file: str) -> None:
    """Raise ConfigError if the DeepSpeed JSON decides the global batch, for which it may need the number of ranks."""
    path = find_file(config.deepspeed.config, run_file)
    if path is None or "global_batch" in config.training.model_fields_set:
        return
    given = read_deepspeed_json(path)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        if given.get(key, "auto") != "auto":
            raise ConfigError(
                f"training.global_batch: {path.name} decides it by {key}; write it into {run_file} to see batches"
            )


def view_of_set(
    prefix: str,
    global_batch: int = 1024,
    sequence_length: int | None = None,
    order: Literal["stored", "shuffled"] = "stored",
    seed: int = 1234,
    tokenizer: str | None = None,
) -> View:
    """Return all of a set as training text.

    sequence_length: by default what fits documents that all have the same length, else 2048. Raises DataError if the
    set holds less than one sequence, and ConfigError for a number out of range.
    """
    indexed = IndexedTokens(prefix)
    known = read_known(prefix, indexed, None, tokenizer, None)
    if sequence_length is None:
        first = indexed.start(1) if indexed.num_documents else 0
        sequence_length = first - 1 if first > 1 and indexed.all_documents_hold(first) else 2048
    at_least("--sequence-length", sequence_length, 1)
    at_least("--global-batch", global_batch, 1, at_most=10**7)
    dataset = token_dataset(indexed, sequence_length, known.vocab_size or int(np.iinfo(indexed.dtype).max) + 1)
    if not len(dataset):
        needed = f"holds {indexed.num_tokens} tokens, a sequence needs {sequence_length + 1}"
        raise DataError(f"{indexed.name}: {needed}; lower --sequence-length")
    sequences = TrainingSequences([PreparedData(dataset)], global_batch, seed, order)
    try:
        loaded = _load(known.tokenizer) if known.tokenizer is not None else None
    except DataError as error:  # of --tokenizer, it would have been raised above
        say(f"l2e-ds: no text is shown: {error}")
        loaded = None
    return View(sequences, loaded, known.end_of_text)


def show(view: View, step: int, row: int | None) -> int:
    """Print a list of the sequences of global batch `step`, or the one in row `row` in full. Raises ConfigError."""
    at_least("--step", step, 0, at_most=10**10)
    batch = view.sequences.global_batch
    if row is not None and not 0 <= row < batch:
        raise ConfigError(f"--sequence: got {row}, allowed: 0 to {batch - 1}, the sequences of a batch")
    if view.steps is not None and step >= view.steps:
        warn(f"--step: the run ends with step {view.steps - 1} (training.steps: {view.steps})")
    for line in _list_batch(view, step) if row is None else _show_sequence(view, step, row):
        print(line)
    return 0


def _list_batch(view: View, step: int) -> Iterator[str]:
    sets, epochs, numbers = (values.tolist() for values in view.sequences.rows(step))
    names = [data_set.name for data_set in view.sequences.sets]
    where = view.dataset(0).name if len(names) == 1 else f"{len(names)} sets"
    length = view.dataset(0).sequence_length
    yield f"step {step}: {len(numbers):,} sequences of {length:,} tokens (and one more, the last target) of {where}"
    width = max(map(len, names)) + 2 if names[0] else 0
    head = f"{'set':<{width}}" if width else ""
    yield f"{'row':>5}  {head}{'epoch':>5}  {'sequence':>12}  {'documents':>9}  {'end-of-text':>11}  begins with"
    for row, (index, epoch, number) in enumerate(zip(sets, epochs, numbers, strict=True)):
        dataset = view.dataset(index)
        ids = dataset[number]
        ends = "-" if view.end_of_text is None else f"{np.count_nonzero(ids == view.end_of_text):,}"
        documents = len(_documents_in(dataset, number)) or "-"
        name = f"{names[index]:<{width}}" if width else ""
        preview = " ".join(map(str, ids[:_TOKENS_PER_LINE].tolist()))
        if view.tokenizer is not None:
            preview = json.dumps(_decode(view.tokenizer, ids[:_TOKENS_PER_LINE]), ensure_ascii=False)
        yield f"{row:>5}  {name}{epoch:>5}  {number:>12,}  {documents:>9}  {ends:>11}  {preview} ..."


def _show_sequence(view: View, step: int, row: int) -> Iterator[str]:
    index, epoch, number = (int(values[row]) for values in view.sequences.rows(step))
    dataset, name = view.dataset(index), view.sequences.sets[index].name
    within = f"{len(dataset):,} of {name}" if name else f"{len(dataset):,}"
    ids, first = dataset[number], dataset.position(number)
    yield (
        f"step {step}, row {row} of {view.sequences.global_batch:,}: sequence {number:,} of {within}, epoch {epoch},"
        f" tokens {first:,} to {first + len(ids) - 1:,} of {dataset.name}"
    )
    yield f"inputs are tokens 0 to {len(ids) - 2} of it, targets are tokens 1 to {len(ids) - 1}"
    documents = _documents_in(dataset, number)
    for at, document, token in documents:
        yield f"at {at}: document {document:,} of the file, from its token {token:,} on"
    ends = [] if view.end_of_text is None else np.flatnonzero(ids == view.end_of_text).tolist()
    if view.end_of_text is not None:
        yield f"end-of-text (id {view.end_of_text}) at: {', '.join(map(str, ends)) or 'none'}"
    yield "\nids"
    for at in range(0, len(ids), _TOKENS_PER_LINE):
        yield f"{at:>6}  " + " ".join(f"{token:>5}" for token in ids[at : at + _TOKENS_PER_LINE].tolist())
    if view.tokenizer is not None:
        cuts = sorted({0, *(at for at, _, _ in documents), *(end + 1 for end in ends if end + 1 < len(ids))})
        for begin, end in zip(cuts, [*cuts[1:], len(ids)], strict=True):
            yield f"\ntext of tokens {begin} to {end - 1}"
            yield _decode(view.tokenizer, ids[begin:end])


def _documents_in(dataset: TokenDataset, number: int) -> list[tuple[int, int, int]]:
    """Return the documents in a sequence, without empty ones.

    Each is (its position in the sequence, its number, the first of its tokens that is in the sequence).
    """
    if dataset.documents is None:
        return []
    begin = dataset.position(number)
    stop = begin + dataset.sequence_length + 1
    first, last = dataset.documents.document_at(begin), dataset.documents.document_at(stop - 1)
    starts = dataset.documents.starts(np.arange(first, last + 2))
    filled = np.flatnonzero(np.diff(starts))
    return [(max(0, int(starts[i]) - begin), first + int(i), max(0, begin - int(starts[i]))) for i in filled.tolist()]


def _decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    """Return tokens as text, with special tokens. Characters that a terminal would act on are escaped."""
    text = tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="check|show")
    check_parser = verbs.add_parser(
        "check",
        help="verify .bin/.idx sets, print their statistics",
        description="Reads a .bin/.idx set completely, in constant memory: every entry of the index, sizes, every token"
        " id. Prints statistics, or one line for the first defect (exit code 2).",
    )
    check_parser.add_argument(
        "prefixes", nargs="+", metavar="PREFIX", help="name of the files PREFIX.idx and PREFIX.bin, or its parts"
    )
    check_parser.add_argument("--vocab-size", type=int, metavar="N", help="ids from N on are a defect")
    check_parser.add_argument(
        "--tokenizer", metavar="NAME|FILE", help="take vocabulary and end-of-text from this tokenizer"
    )
    check_parser.add_argument("--end-of-text", type=int, metavar="ID", help="count this id")

    show_parser = verbs.add_parser(
        "show",
        help="what a model sees at a step",
        description="Prints global batch K: a list of its sequences, or one of them in full with token ids, text and"
        " documents. The first batch is step 0, as for Pythia's batch_viewer.py: step K is the first batch that a model"
        " resumed from its checkpoint of step K sees, and metrics of step K+1 are the first with it.",
    )
    show_parser.add_argument(
        "source",
        metavar="PREFIX|RUN.yaml",
        help="a .bin/.idx set, or a run file, which then decides all options below but --sequence; text that is not"
        " yet tokenized for that run is tokenized now",
    )
    show_parser.add_argument("--step", type=int, required=True, metavar="K", help="the step, counted from 0")
    show_parser.add_argument(
        "--sequence", type=int, metavar="I", help="show sequence I of the batch, counted from 0, in full"
    )
    show_parser.add_argument("--global-batch", type=int, metavar="G", help="sequences a batch (default: 1024)")
    show_parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens a sequence (default: if all documents have the same length, that length less one; else 2048)",
    )
    show_parser.add_argument("--order", choices=("stored", "shuffled"), help="order of the sequences (default: stored)")
    show_parser.add_argument("--seed", type=int, help="seed of the shuffled order (default: 1234)")
    show_parser.add_argument(
        "--tokenizer", metavar="NAME|FILE", help="tokenizer (default: the one in PREFIX.json, if any)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.data_verb == "check":
        return check(arguments.prefixes, arguments.vocab_size, arguments.tokenizer, arguments.end_of_text)
    names = ("global_batch", "sequence_length", "order", "seed", "tokenizer")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.source.endswith((".yaml", ".yml")):
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ConfigError(f"--{option}: the run file {arguments.source} decides this; leave it out")
        view = view_of_run(arguments.source)
    else:
        view = view_of_set(arguments.source, **given)
    return show(view, arguments.step, arguments.sequence)
