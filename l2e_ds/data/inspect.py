"""`l2e-ds data check` and `l2e-ds data show`: what a .bin/.idx set holds, and what a model sees of it at a step.

T: tokens a sequence. G: sequences a global batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from l2e_ds.config.reading import load_run_config
from l2e_ds.console import at_least, say
from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.indexed import IndexedTokens, pair, read_sidecar
from l2e_ds.data.mixture import TrainingSequences, prepare_sets
from l2e_ds.data.prepare import PreparedData
from l2e_ds.data.tokenizer import find_end_of_text, load_tokenizer, vocabulary_size
from l2e_ds.errors import ConfigError, DataError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

_CHUNK = 1 << 20  # tokens looked at together
_COUNTED = 1 << 24  # larger ids are not counted one by one: that would take memory
_PREVIEW = 16  # tokens
_IDS_A_LINE = 16


# --- what is known about a set ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """From PREFIX.json, which `l2e-ds tokenize` writes, and from options, which come first."""

    vocab_size: int | None = None
    end_of_text: int | None = None
    tokenizer: str | None = None


def read_known(
    prefix: str, indexed: IndexedTokens, vocab_size: int | None, tokenizer: str | None, end_of_text: int | None
) -> Known:
    """Raises DataError where PREFIX.json is broken or belongs to another set, or the tokenizer cannot be loaded."""
    known = _read_sidecar(prefix, indexed)
    if tokenizer is not None:
        loaded = _load(tokenizer)
        known = Known(vocabulary_size(loaded), find_end_of_text(loaded), tokenizer)
    size = known.vocab_size if vocab_size is None else at_least("--vocab-size", vocab_size, 1)
    end = known.end_of_text if end_of_text is None else at_least("--end-of-text", end_of_text, 0)
    if size is not None and end is not None and end >= size:
        raise DataError(f"{prefix}: end-of-text is id {end}, but the vocabulary has ids 0 to {size - 1}")
    return Known(size, end, known.tokenizer)


def _read_sidecar(prefix: str, indexed: IndexedTokens) -> Known:
    path, found = pair(prefix)[0].with_suffix(".json"), read_sidecar(prefix)
    for key, own in (("documents", indexed.num_documents), ("tokens", indexed.num_tokens)):
        if found.get(key, own) != own:
            raise DataError(f"{path}: says {found[key]} {key}, but {indexed.idx_path} has {own}")
    size, end = found.get("vocabulary"), found.get("end_of_text")
    if not all(number is None or isinstance(number, int) for number in (size, end)):
        raise DataError(f"{path}: vocabulary and end_of_text must be integers, got {size!r} and {end!r}")
    tokenizer = found.get("tokenizer")
    return Known(size, end, tokenizer if isinstance(tokenizer, str) else None)


def _load(tokenizer: str) -> PreTrainedTokenizerFast:
    try:
        return load_tokenizer(tokenizer)
    except DataError as error:
        error.rename({"data.tokenizer": "--tokenizer"})
        raise


# --- check ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Quartiles are lengths that occur: the smallest that at least a quarter (half, three quarters) do not exceed."""

    documents: int
    tokens: int
    empty_documents: int
    shortest: int
    quartiles: tuple[int, int, int]
    longest: int
    distinct_ids: int | None
    """None where ids are so large that they are not counted one by one."""
    largest_id: int
    end_of_text: int | None
    """How often it occurs; None where the id is not known."""

    @property
    def mean_length(self) -> float:
        return self.tokens / max(1, self.documents)


def check(prefixes: Sequence[str], vocab_size: int | None, tokenizer: str | None, end_of_text: int | None) -> int:
    """Verify each set completely and print its statistics. Raises DataError for the first defect."""
    for prefix in prefixes:
        indexed = IndexedTokens(prefix)
        known = read_known(prefix, indexed, vocab_size, tokenizer, end_of_text)
        found = examine(indexed, known)
        print(*_describe(prefix, indexed, known, found), sep="\n")
    return 0


def examine(indexed: IndexedTokens, known: Known) -> Statistics:
    """Read all of a set, in flat memory. Raises DataError for the first defect."""
    with _bar("index", indexed.num_sequences, "sequence") as bar:
        indexed.check_index(bar.update)
    lengths = _length_counts(indexed)
    with _bar("tokens", indexed.num_tokens, "token") as bar:
        counts, largest = _id_counts(indexed, known.vocab_size, bar.update)
    documents = indexed.num_documents
    quartiles = [_quantile(lengths, documents, quarter) for quarter in (1, 2, 3)]
    countable = largest < _COUNTED
    end = known.end_of_text
    times = int(counts[end]) if end is not None and end < len(counts) else 0
    return Statistics(
        documents=documents,
        tokens=indexed.num_tokens,
        empty_documents=lengths[0],
        shortest=min(lengths, default=0),
        quartiles=(quartiles[0], quartiles[1], quartiles[2]),
        longest=max(lengths, default=0),
        distinct_ids=int(np.count_nonzero(counts)) if countable else None,
        largest_id=largest,
        end_of_text=None if end is None or end >= _COUNTED else times,
    )


def _bar(what: str, total: int, unit: str) -> tqdm:
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None, leave=False, dynamic_ncols=True)


def _length_counts(indexed: IndexedTokens) -> Counter[int]:
    """Return how many documents have which length: few different numbers, however many documents."""
    lengths: Counter[int] = Counter()
    for chunk in indexed.lengths_in_chunks():
        values, counts = np.unique(chunk, return_counts=True)
        lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return lengths


def _quantile(lengths: Counter[int], documents: int, quarters: int) -> int:
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if 4 * seen >= quarters * documents:
            return length
    return 0


def _id_counts(
    indexed: IndexedTokens, vocab_size: int | None, advance: Callable[[int], object]
) -> tuple[np.ndarray, int]:
    """Return how often each id below _COUNTED occurs, int64, and the largest id (-1: there is none)."""
    counts, largest = np.zeros(0, dtype=np.int64), -1
    for path, first, ids in _token_chunks(indexed):
        high = int(ids.max())
        if ids.min() < 0 or (vocab_size is not None and high >= vocab_size):
            at = int(np.flatnonzero((ids < 0) | (ids >= (high + 1 if vocab_size is None else vocab_size)))[0])
            allowed = "ids are >= 0" if vocab_size is None else f"the vocabulary has ids 0 to {vocab_size - 1}"
            raise DataError(f"{path}: token id {ids[at]} at position {first + at}, but {allowed}")
        largest = max(largest, high)
        found = np.bincount(ids if high < _COUNTED else ids[ids < _COUNTED], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        advance(len(ids))
    return counts, largest


def _token_chunks(indexed: IndexedTokens) -> Iterator[tuple[Path, int, np.ndarray]]:
    """File, position in it and ids. Read, not mapped: pages of a mapped file count as this process's memory."""
    for path, part in indexed.files:
        try:
            with open(path, "rb") as file:
                for first in range(0, len(part), _CHUNK):
                    ids = np.fromfile(file, indexed.dtype, min(_CHUNK, len(part) - first))
                    if len(ids) < min(_CHUNK, len(part) - first):
                        raise DataError(f"{path}: became shorter while it was read")
                    yield path, first, ids
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


def _describe(prefix: str, indexed: IndexedTokens, known: Known, found: Statistics) -> list[str]:
    files = len(indexed.files)
    of = f", of {known.vocab_size:,} in the vocabulary" if known.vocab_size is not None else ""
    distinct = f"ids up to {found.largest_id:,}, too large to be counted"
    if found.distinct_ids is not None:
        distinct = f"{found.distinct_ids:,} different ids, largest {found.largest_id}{of}"
    low, middle, high = found.quartiles
    rows = [
        ("files", f"{files} .bin, {indexed.dtype.name}"),
        ("documents", f"{found.documents:,}, {found.empty_documents:,} of them empty"),
        ("tokens", f"{found.tokens:,}"),
        (
            "tokens a document",
            f"least {found.shortest:,}, quartiles {low:,}, {middle:,}, {high:,}, mean {found.mean_length:,.1f},"
            f" most {found.longest:,}",
        ),
        ("vocabulary used", distinct if found.tokens else "none"),
        (
            "end-of-text",
            "id not known" if found.end_of_text is None else f"{found.end_of_text:,} (id {known.end_of_text})",
        ),
    ]
    return [f"{prefix}: no defect found", *(f"  {label.ljust(17)}  {value}" for label, value in rows)]


# --- show -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """The batches of a run, its sets' training text, and how to read it."""

    sequences: TrainingSequences
    datasets: list[TokenDataset]
    names: list[str]
    tokenizer: PreTrainedTokenizerFast | None
    end_of_text: int | None
    steps: int | None = None
    """Of a run: its training.steps."""


def view_of_run(run_file: str) -> View:
    """As training reads it. Text that was not tokenised for this run yet is tokenised now."""
    from l2e_ds.models.pythia import network_config  # with torch, for which nothing else here waits

    config = load_run_config(run_file)
    network = network_config(config.model, config.data.sequence_length)
    cache = Path(config.data.cache) if config.data.cache else Path(config.training.run_directory) / "data"
    if any(part.streaming for _, _, part in config.data.parts()):
        raise ConfigError(f"{run_file}: data.streaming: a stream can only be read in order; no step of it can be shown")
    sets = prepare_sets(config.data, cache, network.vocab_size, config.training.evaluation_sequences)
    tokenizer = next((part.tokenizer for part in sets if part.tokenizer is not None), None)
    end = None if tokenizer is None else find_end_of_text(tokenizer)
    view = _view(sets, config.training.global_batch, config.training.seed, config.data.order, tokenizer, end)
    return replace(view, steps=config.training.steps)


def view_of_set(
    prefix: str,
    global_batch: int = 1024,
    sequence_length: int | None = None,
    order: Literal["stored", "shuffled"] = "stored",
    seed: int = 1234,
    tokenizer: str | None = None,
) -> View:
    """Return all of a set as training text.

    Default sequence length: what fits documents that are all of one length, else 2048. Raises DataError where the set
    holds less than one sequence.
    """
    indexed = IndexedTokens(prefix)
    known = read_known(prefix, indexed, None, tokenizer, None)
    first = len(indexed.document(0)) if indexed.num_documents else 0
    if sequence_length is None:
        sequence_length = first - 1 if first > 1 and indexed.all_documents_hold(first) else 2048
    width = at_least("--sequence-length", sequence_length, 1) + 1
    at_least("--global-batch", global_batch, 1, at_most=10**7)
    dataset = TokenDataset(
        *(indexed.tokens, 0, indexed.num_tokens, sequence_length),
        known.vocab_size or int(np.iinfo(indexed.dtype).max) + 1,
        indexed.name,
        width if indexed.all_documents_hold(width) else None,
        indexed,
    )
    if not len(dataset):
        raise DataError(
            f"{indexed.name}: holds {indexed.num_tokens} tokens, a sequence needs {width}; lower --sequence-length"
        )
    one = PreparedData(dataset, None, None, dataset.num_tokens, 0, None)
    loaded = _tokenizer_if_there(known, asked_for=tokenizer is not None)
    return _view([one], global_batch, seed, order, loaded, known.end_of_text)


def _view(
    sets: list[PreparedData],
    global_batch: int,
    seed: int,
    order: Literal["shuffled", "stored"],
    tokenizer: PreTrainedTokenizerFast | None,
    end_of_text: int | None,
) -> View:
    sequences = TrainingSequences(sets, global_batch, seed, order)
    datasets = [part.train for part in sets if part.train is not None]
    return View(sequences, datasets, [part.name for part in sets], tokenizer, end_of_text)


def _tokenizer_if_there(known: Known, asked_for: bool) -> PreTrainedTokenizerFast | None:
    if known.tokenizer is None:
        return None
    try:
        return _load(known.tokenizer)
    except DataError as error:
        if asked_for:
            raise
        print(f"l2e-ds: no text is shown: {error}", file=sys.stderr)
        return None


def show(view: View, step: int, row: int | None) -> int:
    """Print global batch `step`, or one sequence of it in full."""
    at_least("--step", step, 0, at_most=10**10)
    batch = view.sequences.global_batch
    if row is not None and not 0 <= row < batch:
        raise ConfigError(f"--sequence: got {row}, allowed: 0 to {batch - 1}, the sequences of a batch")
    if view.steps is not None and step >= view.steps:
        say(f"l2e-ds: warning: --step: the run ends with step {view.steps - 1} (training.steps: {view.steps})")
    for line in _list_batch(view, step) if row is None else _show_sequence(view, step, row):
        print(line)
    return 0


def _list_batch(view: View, step: int) -> Iterator[str]:
    sets, epochs, numbers = (values.tolist() for values in view.sequences.rows(step))
    where = view.datasets[0].name if len(view.names) == 1 else f"{len(view.names)} sets"
    length = view.datasets[0].sequence_length
    yield f"step {step}: {len(numbers):,} sequences of {length:,} tokens (and one more, the last target) of {where}"
    width = max(map(len, view.names)) + 2 if view.names[0] else 0
    named = f"{'set':<{width}}" if width else ""
    yield f"{'row':>5}  {named}{'epoch':>5}  {'sequence':>12}  {'documents':>9}  {'end-of-text':>11}  begins with"
    for row, (part, epoch, number) in enumerate(zip(sets, epochs, numbers, strict=True)):
        dataset = view.datasets[part]
        ids = dataset[number]
        ends = "-" if view.end_of_text is None else f"{np.count_nonzero(ids == view.end_of_text):,}"
        documents = f"{len(_documents_in(dataset, number)) or '-':>9}"
        name = f"{view.names[part]:<{width}}" if width else ""
        yield f"{row:>5}  {name}{epoch:>5}  {number:>12,}  {documents}  {ends:>11}  {_preview(view, ids)}"


def _preview(view: View, ids: np.ndarray) -> str:
    if view.tokenizer is None:
        return " ".join(map(str, ids[:_PREVIEW].tolist())) + " ..."
    return json.dumps(_decode(view.tokenizer, ids[:_PREVIEW]), ensure_ascii=False) + " ..."


def _show_sequence(view: View, step: int, row: int) -> Iterator[str]:
    part, epoch, number = (int(values[row]) for values in view.sequences.rows(step))
    dataset = view.datasets[part]
    within = f"{len(dataset):,} of {view.names[part]}" if view.names[part] else f"{len(dataset):,}"
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
    for at in range(0, len(ids), _IDS_A_LINE):
        yield f"{at:>6}  " + " ".join(f"{one:>5}" for one in ids[at : at + _IDS_A_LINE].tolist())
    if view.tokenizer is not None:
        cuts = sorted({0, *(at for at, _, _ in documents), *(end + 1 for end in ends if end + 1 < len(ids))})
        for begin, end in zip(cuts, [*cuts[1:], len(ids)], strict=True):
            yield f"\ntext of tokens {begin} to {end - 1}"
            yield _decode(view.tokenizer, ids[begin:end])


def _documents_in(dataset: TokenDataset, number: int) -> list[tuple[int, int, int]]:
    """Return the documents in a sequence, without empty ones: where in it, which, and from which token on."""
    if dataset.documents is None:
        return []
    begin = dataset.position(number)
    stop = begin + dataset.sequence_length + 1
    first, last = dataset.documents.document_at(begin), dataset.documents.document_at(stop - 1)
    starts = dataset.documents.starts(np.arange(first, last + 2))
    filled = np.flatnonzero(np.diff(starts))
    return [(max(0, int(starts[i]) - begin), first + int(i), max(0, begin - int(starts[i]))) for i in filled.tolist()]


def _decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    """With special tokens; characters that a terminal would act on are escaped."""
    text = tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="check|show")
    about = (
        "Reads everything in a .bin/.idx set, in flat memory: every entry of the index, sizes, every token id. Prints"
    )
    about += " statistics, or one line for the first defect (exit code 2)."
    checking = verbs.add_parser("check", help="verify .bin/.idx sets, print their statistics", description=about)
    checking.add_argument("prefixes", nargs="+", metavar="PREFIX", help="of PREFIX.idx and PREFIX.bin, or its parts")
    checking.add_argument("--vocab-size", type=int, metavar="N", help="ids from N on are a defect")
    checking.add_argument("--tokenizer", metavar="NAME|FILE", help="takes vocabulary and end-of-text from there")
    checking.add_argument("--end-of-text", type=int, metavar="ID", help="count this id")

    about = "Prints global batch K: a list of its sequences, or one of them in full with token ids, text and documents."
    about += " The first batch is step 0, as for Pythia's batch_viewer.py: step K is the first batch that a model"
    about += " resumed from its checkpoint of step K sees, and metrics of step K+1 are the first with it."
    showing = verbs.add_parser("show", help="what a model sees at a step", description=about)
    showing.add_argument(
        "source",
        metavar="PREFIX|RUN.yaml",
        help="a .bin/.idx set, or a run file, which then decides all options below but --sequence; text that was not"
        " tokenised for that run yet is tokenised now",
    )
    showing.add_argument("--step", type=int, required=True, metavar="K", help="counted from 0")
    showing.add_argument("--sequence", type=int, metavar="I", help="sequence I of the batch, counted from 0, in full")
    showing.add_argument("--global-batch", type=int, metavar="G", help="sequences a batch (default: 1024)")
    showing.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="default: of documents of one length, that length less one; else 2048",
    )
    showing.add_argument("--order", choices=("stored", "shuffled"), help="default: stored")
    showing.add_argument("--seed", type=int, help="of the shuffled order (default: 1234)")
    showing.add_argument("--tokenizer", metavar="NAME|FILE", help="default: the one in PREFIX.json, if there")


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
