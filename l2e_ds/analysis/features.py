"""Read feature sets: texts that are labelled with one feature each (docs/feature-sets.md), as tokens of one length.

The source is read twice: first every record is checked and counted, then the tokens of the chosen texts are kept.

F: features. T: tokens of a text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from l2e_ds.config.sections import SourceConfig
from l2e_ds.console import aligned, at_least
from l2e_ds.data import sources
from l2e_ds.data.compressed import COMPRESSED, open_decompressed
from l2e_ds.data.tokenizer import tokenizer_digest
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.system.files import one_line

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast

MINIMUM_TEXTS = 20
"""The fewest texts of a feature. A probe is tested on a fifth of them, which are four; with fewer, F1 says nothing."""
_BATCH_CHARACTERS = 1 << 20  # tokenized at once
_BATCH_ROWS = 64  # rows of Parquet that are decoded at once
_COUNTS = ("found", "too_short", "kept", "tokens")  # columns of the report

Row = tuple[str, str]
"""(feature, text), of which neither is blank."""


@dataclass(frozen=True)
class FeatureSet:
    """The same number of texts for every feature, in shuffled order."""

    features: tuple[str, ...]
    """The features' names, sorted."""
    tokens: np.ndarray
    """The texts' tokens, int32 [texts, T]."""
    labels: np.ndarray
    """The index of each text's feature in `features`, int64 [texts]."""
    report: dict[str, Any]
    """A description for JSON: `source`, `tokenizer`, `digest` (SHA-256 of features, tokens and labels), `seed`,
    `sequence_length`, `texts_per_feature`; counts of each of the `features`, and the `total`."""


def load_feature_set(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    sequence_length: int,
    texts_per_feature: int | None,
    seed: int,
    text_column: str = "text",
    feature_column: str = "feature",
    split: str = "train",
) -> FeatureSet:
    """Return the first `sequence_length` tokens, without special ones, of randomly chosen texts of every feature.

    source: .jsonl (also compressed) or .parquet files (a path or a glob pattern), a folder that `datasets` loads, or a
    data set of the hub as `owner/name[/config][@revision]`. split: for the last two. Features are texts, or integers
    that the data set's ClassLabel names. Texts of fewer tokens are left out and counted.

    texts_per_feature: by default as many as the scarcest feature has. Which texts of a feature are chosen depends only
    on the seed, the feature's name and the order of its own texts.

    Raises DataError (with file and line) for a bad record, and ConfigError for a set that cannot be balanced.
    """
    at_least("--sequence-length", sequence_length, 1)
    at_least("--texts-per-feature", texts_per_feature, MINIMUM_TEXTS)
    at_least("--seed", seed, 0)
    truncating = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the original keeps its settings
    truncating.no_padding()
    truncating.enable_truncation(sequence_length)

    read = partial(_rows, source, text_column, feature_column, split)
    found: Counter[str] = Counter()
    long_enough: dict[str, array[int]] = defaultdict(lambda: array("q"))  # the numbers of the rows
    for number, (feature, ids) in enumerate(_encoded(read(), truncating)):
        found[feature] += 1
        if len(ids) == sequence_length:
            long_enough[feature].append(number)
    features = tuple(sorted(found))
    available = {feature: len(long_enough[feature]) for feature in features}
    count = _balanced_count(source, found, available, sequence_length, texts_per_feature)

    chosen = np.concatenate([_choice(long_enough[feature], count, seed, feature) for feature in features])
    order = np.random.default_rng(seed).permutation(len(chosen))
    rows, labels = chosen[order], np.repeat(np.arange(len(features)), count)[order]
    tokens = _tokens_of(rows, [features[label] for label in labels], read(), truncating, sequence_length)
    if tokens is None:
        raise DataError(f"--features: {source} changed while it was read")

    digest = hashlib.sha256(json.dumps(features).encode())
    digest.update(tokens.astype("<i4").tobytes())
    digest.update(labels.astype("<i8").tobytes())
    table: list[dict[str, Any]] = [
        {
            "feature": feature,
            "found": found[feature],
            "too_short": found[feature] - available[feature],
            "kept": count,
            "tokens": count * sequence_length,
            "share": count / len(rows),
        }
        for feature in features
    ]
    report = {
        "source": source,
        "tokenizer": tokenizer.name_or_path or f"SHA-256 {tokenizer_digest(tokenizer)[:12]}",
        "digest": digest.hexdigest(),
        "seed": seed,
        "sequence_length": sequence_length,
        "texts_per_feature": count,
        "features": table,
        "total": {key: sum(line[key] for line in table) for key in _COUNTS} | {"share": 1.0},
    }
    return FeatureSet(features, tokens, labels, report)


def _tokens_of(
    rows: np.ndarray, features: Sequence[str], texts: Iterable[Row], truncating: Tokenizer, sequence_length: int
) -> np.ndarray | None:
    """Return the tokens of chosen rows in their order, int32 [rows, T]; None if they are no longer what they were.

    rows: int64 [rows], the numbers of texts among `texts`. features: of each.
    """
    tokens = np.empty((len(rows), sequence_length), np.int32)
    wanted, last = set(rows.tolist()), int(rows.max())
    chosen = (row for number, row in islice(enumerate(texts), last + 1) if number in wanted)
    read = 0
    for place, (feature, ids) in zip(np.argsort(rows), _encoded(chosen, truncating), strict=False):
        if feature != features[place] or len(ids) != sequence_length:
            return None
        tokens[place] = ids
        read += 1
    return tokens if read == len(rows) else None


def format_report(report: dict[str, Any]) -> str:
    """Return the report of a FeatureSet as text: a description, then an aligned table."""
    facts = [
        ("source", report["source"]),
        ("tokenizer", report["tokenizer"]),
        ("tokens of a text", f"{report['sequence_length']:,}"),
        ("seed", str(report["seed"])),
        ("SHA-256", report["digest"]),
    ]
    rows = [["feature", "found", "too short", "kept", "tokens", "share"]]
    for line in [*report["features"], {"feature": "all", **report["total"]}]:
        rows.append([line["feature"], *(f"{line[key]:,}" for key in _COUNTS), f"{line['share']:.1%}"])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([name.ljust(first), *map(str.rjust, numbers, widths)]) for name, *numbers in rows]
    return "\n".join([aligned(facts), "", *lines])


def _balanced_count(
    source: str, found: Counter[str], available: dict[str, int], sequence_length: int, asked: int | None
) -> int:
    """Return how many texts of every feature are chosen. Raises ConfigError."""
    if len(found) < 2:
        what = f"only the feature {next(iter(found))!r}" if found else "no text"
        raise ConfigError(f"--features: {source} holds {what}; at least two features are needed")
    if scarce := [feature for feature, count in available.items() if count < MINIMUM_TEXTS]:
        raise ConfigError(
            f"--features: {source} has fewer than {MINIMUM_TEXTS} texts of at least {sequence_length} tokens of:"
            f" {_named({name: f'{available[name]} of {found[name]} texts' for name in scarce})}; give a"
            " smaller --sequence-length, add or join texts, or take these features out of the source"
        )
    fewest = min(available.values())
    if asked is not None and asked > fewest:
        scarce = [feature for feature, count in available.items() if count < asked]
        raise ConfigError(
            f"--texts-per-feature: got {asked}, {source} has fewer texts of at least {sequence_length} tokens of:"
            f" {_named({name: str(available[name]) for name in scarce})}; allowed: {MINIMUM_TEXTS} to {fewest}"
        )
    return asked or fewest


def _choice(rows: array[int], count: int, seed: int, feature: str) -> np.ndarray:
    """Choose `count` of a feature's rows, independently of all other features."""
    random = np.random.default_rng([seed, *hashlib.sha256(feature.encode()).digest()])
    return np.frombuffer(rows, np.int64)[random.permutation(len(rows))[:count]]


def _encoded(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """Yield (feature, token ids) for each row, in order."""
    while True:
        batch: list[Row] = []
        characters = 0
        while characters < _BATCH_CHARACTERS and (row := next(rows, None)) is not None:
            batch.append(row)
            characters += len(row[1])
        if not batch:
            return
        encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        for (feature, _), encoding in zip(batch, encodings, strict=True):
            yield feature, encoding.ids


def _rows(source: str, text_column: str, feature_column: str, split: str) -> Iterator[Row]:
    """Yield all records, checked, in the order of the source. Raises DataError."""
    columns = {"--text-column": text_column, "--feature-column": feature_column}
    path = Path(source).expanduser()
    try:
        uncompressed = path.with_suffix("") if path.suffix in COMPRESSED else path
        if path.is_dir():
            yield from _data_set_rows(SourceConfig(source="hub", path=source, split=split), columns)
        elif uncompressed.suffix == ".jsonl":
            for file in sources.source_files(SourceConfig(source="jsonl", path=source)):
                yield from _jsonl_rows(file, columns)
        elif path.suffix == ".parquet":
            for file in sources.source_files(SourceConfig(source="parquet", path=source)):
                yield from _parquet_rows(file, columns)
        elif path.exists():
            raise DataError(
                f"{source} must be .jsonl (also {', '.join(COMPRESSED)}), .parquet or a folder",
                where="data.path",
            )
        elif sources.looks_local(source):
            raise DataError(f"no such file or folder: {source}", where="data.path")
        else:
            yield from _data_set_rows(_on_hub(source, split), columns)
    except DataError as error:  # about keys of a run file, in place of which the command has options
        error.rename({"data.path": "--features", "data.split": "--split"})
        raise


def _on_hub(source: str, split: str) -> SourceConfig:
    name, _, revision = source.partition("@")
    owner_and_name, subset = name.split("/")[:2], name.split("/")[2:]
    if not all(owner_and_name) or len(subset) > 1:
        raise DataError(
            f"got {source!r}, must be a file, a folder or owner/name[/config][@revision]", where="data.path"
        )
    return SourceConfig(
        source="hub",
        path="/".join(owner_and_name),
        subset=subset[0] if subset else None,
        revision=revision or None,
        split=split,
    )


def _jsonl_rows(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    with open_decompressed(path) as (stream, _):
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = sources.json_object(line.removeprefix(codecs.BOM_UTF8), where, "an object")
            _check_columns(columns, list(record), where)
            yield _row(record, columns, None, where)


def _parquet_rows(path: Path, columns: dict[str, str]) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(columns, file.schema_arrow.names, str(path))
            names = _label_names(file.schema_arrow, columns["--feature-column"])
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns.values())):
                values = [sources.python_values(batch.column(name)) for name in columns.values()]
                for pair in zip(*values, strict=True):
                    yield _row(dict(zip(columns.values(), pair, strict=True)), columns, names, f"{path}: row {number}")
                    number += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None


def _label_names(schema: Any, column: str) -> list[str] | None:
    """Return the names of a ClassLabel, which `datasets` keeps in the file's metadata, or None."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    import datasets

    return getattr(datasets.Features.from_arrow_schema(schema)[column], "names", None)


def _data_set_rows(config: SourceConfig, columns: dict[str, str]) -> Iterator[Row]:
    stream = sources.load_hub(config)
    label = (stream.features or {}).get(columns["--feature-column"])
    try:
        for number, record in enumerate(stream):
            where = f"{config.path}: row {number}"
            _check_columns(columns, list(record), where)
            yield _row(record, columns, getattr(label, "names", None), where)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"reading {config.path!r} failed: {one_line(error)}", where="data.path") from None


def _check_columns(columns: dict[str, str], there: list[str], where: str) -> None:
    for option, column in columns.items():
        if column not in there:
            allowed = ", ".join(map(str, there)) or "(none)"
            raise DataError(f"{where}: no column {column!r}; set {option} to one of: {allowed}")


def _named(counts: dict[str, str], most: int = 12) -> str:
    """Return names with counts, cut off, as a column that holds no features may have thousands of values."""
    parts = [f"{shorten(name, 40, placeholder='...')} ({count})" for name, count in islice(counts.items(), most)]
    return ", ".join(parts) + (f" and {len(counts) - most} more" if len(counts) > most else "")


def _row(record: dict[str, Any], columns: dict[str, str], names: list[str] | None, where: str) -> Row:
    text, feature = (record[column] for column in columns.values())
    if names is not None and isinstance(feature, int):
        if not 0 <= feature < len(names):
            raise DataError(
                f"{where}: {columns['--feature-column']!r} is {feature}, the data set names 0 to {len(names) - 1}"
            )
        feature = names[feature]
    for column, value in zip(columns.values(), (text, feature), strict=True):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where}: {column!r} is empty")
        if not isinstance(value, str):
            raise DataError(f"{where}: {column!r} is a {type(value).__name__}, must be text")
    return sources.printable(feature.strip()), sources.printable(text)
