"""Where text comes from: the standard library, text files, JSON lines, Parquet, Hugging Face data sets.

`chunks` reads about a megabyte of raw input at a time and leaves the work on it (JSON, UTF-8) to whoever calls the
chunk, which may be another process. `documents` yields texts in one process. Either way the order depends on nothing
but the configuration and the files.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from l2e_ds.config.sections import SourceConfig
from l2e_ds.data.compressed import COMPRESSED, open_decompressed
from l2e_ds.data.indexed import IndexedTokens, pair
from l2e_ds.errors import DataError
from l2e_ds.system.files import one_line

# The files that are read where data.path names a folder.
PATTERNS = {
    "text": ("*.txt", *(f"*.txt{suffix}" for suffix in COMPRESSED)),
    "jsonl": ("*.jsonl", *(f"*.jsonl{suffix}" for suffix in COMPRESSED)),
    "parquet": ("*.parquet",),
}
CHUNK_BYTES = 1 << 20  # large enough that handing it to another process costs nothing, small enough for memory
_CHUNK_FILES = 256
_CHUNK_ROWS = 1024
_BATCH_ROWS = 64  # rows of Parquet that are decoded at once
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


Record = str | DataError
"""The text of a document, or the error that says why there is none."""
Chunk = Callable[[str], Iterator[Record]]
"""Some raw input. Called with the text key, it yields its records in order. It can be sent to another process."""
Position = dict[str, Any]
"""The place in the input after a chunk, from which reading resumes. It can be written as JSON. Its keys:

`bytes`: how many bytes of the input files have been read; `file`: index of the file to read next; `offset`, `line`:
how many (decompressed) bytes and lines of that file have been read; `group`, `row`: row group of a Parquet file, and
how many of its rows have been read; `rows`, `state`: rows read of a Hugging Face data set, and its own state.
"""


def chunks(config: SourceConfig, position: Position | None = None) -> Iterator[tuple[Chunk, Position]]:
    """Yield the chunks of the input from a position on, in order, each with the position after it. Raises DataError."""
    if config.source not in _READERS:
        raise DataError(f"{config.source} holds tokens, not text; allowed: {', '.join(_READERS)}", where="data.source")
    return _READERS[config.source](config, position or {})


def documents(config: SourceConfig, skip_bad: bool = False) -> Iterator[str]:
    """Yield the non-empty documents of a text source, at most `max_documents`.

    Raises DataError, also for a record that holds no text, unless `skip_bad` is set.
    """
    raw = chunks(config)  # raises here, not at the first text

    def texts() -> Iterator[str]:
        for record in (record for chunk, _ in raw for record in chunk(config.text_key)):
            if not isinstance(record, DataError):
                if record.strip():
                    yield record
            elif not skip_bad:
                raise record

    return islice(texts(), config.max_documents)


def input_bytes(config: SourceConfig) -> int | None:
    """Return the bytes of all local files together, or None for a data set of the hub."""
    files = source_files(config)
    return sum(map(_file_bytes, files)) if files else None


def check_source(config: SourceConfig) -> None:
    """Raise DataError if the source is missing, unreadable at its beginning or empty. Writes nothing.

    Does not access the hub: of a `hub` source that names a local folder, only the folder's existence is checked.
    """
    if config.source == "indexed":
        if IndexedTokens(config.path or []).num_tokens == 0:
            raise DataError(f"{name_of(config)} holds no tokens", where="data.path")
    elif config.source == "hub":
        if looks_local(str(config.path)) and not Path(str(config.path)).expanduser().exists():
            raise DataError(f"no such file or folder: {config.path}", where="data.path")
    elif next(documents(config), None) is None:
        raise DataError(f"{name_of(config)} holds no text", where="data.path" if config.path else "data.source")


def name_of(config: SourceConfig) -> str:
    """Return what messages call a source: its path or paths, or else its kind."""
    if isinstance(config.path, list):
        return ", ".join(config.path[:3]) + (" ..." if len(config.path) > 3 else "")
    return config.path or str(config.source)


def looks_local(name: str) -> bool:
    """Return whether a name can only be a path, not `owner/name` on the hub."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def source_files(config: SourceConfig) -> list[Path]:
    """Return the local files of a source in reading order, each once; none for a data set of the hub.

    Raises DataError naming the entry of data.path that matches no file.
    """
    if config.source == "stdlib":
        return _stdlib_files()
    if config.source == "indexed":
        return [file for prefix in path_entries(config) for file in pair(prefix)]
    if config.source == "hub":
        folder = Path(str(config.path)).expanduser()
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not (entries := path_entries(config)):
        raise DataError("got [], give at least one file, folder or glob pattern", where="data.path")
    files: dict[Path, Path] = {}
    for entry in entries:
        for path in _files_of_entry(entry, PATTERNS[str(config.source)]):
            files.setdefault(path.resolve(), path)
    uncompressed: dict[Path, Path] = {}
    for path in files.values():
        name = path.stem if path.suffix in COMPRESSED else path.name
        other = uncompressed.setdefault(path.parent.resolve() / name, path)
        if other != path:
            raise DataError(
                f"{other} and {path} are the same text twice, by their names; remove or rename one of them",
                where="data.path",
            )
    return list(files.values())


def path_entries(config: SourceConfig) -> list[str]:
    """Return the entries of data.path as a list."""
    return [config.path] if isinstance(config.path, str) else list(config.path or [])


def unread_files(config: SourceConfig) -> str | None:
    """Return a line that counts the files in the folders of data.path that are not read, or None. Raises DataError."""
    if config.source not in PATTERNS:
        return None
    read = {path.resolve() for path in source_files(config)}
    of_other_kinds: set[Path] = set()
    in_subfolders: set[Path] = set()
    for entry in path_entries(config):
        path = Path(entry).expanduser()
        matched = [] if "**" in entry else map(Path, glob.glob(str(path)))
        for folder in [path] if path.is_dir() else filter(Path.is_dir, matched):
            for parent, _, names in os.walk(folder):
                unread = {Path(parent, name).resolve() for name in names} - read
                (of_other_kinds if Path(parent) == path else in_subfolders).update(unread)
    suffixes = ", ".join(sorted({path.suffix or path.name for path in of_other_kinds})[:5])
    kinds = f"{len(of_other_kinds):,} of other kinds ({suffixes})" if of_other_kinds else ""
    subfolders = f"{len(in_subfolders):,} in subfolders" if in_subfolders else ""
    counted = ", ".join(filter(None, [kinds, subfolders]))
    return f"{name_of(config)}: {len(read):,} read; files passed over: {counted}" if counted else None


def kinds_of(path: Path, patterns: Mapping[str, Sequence[str]] = PATTERNS) -> list[str]:
    """Return the keys of `patterns` that the name of a file matches, or one of the files directly in a folder does."""

    def matches(pattern: str) -> bool:
        return any(path.glob(pattern)) if path.is_dir() else path.match(pattern)

    return [kind for kind, of_kind in patterns.items() if any(map(matches, of_kind))]


def _files_of_entry(entry: str, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files that one entry of data.path (a file, a folder or a glob pattern) stands for, in order."""
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    found: list[Path] = []
    problem = f"no such file or folder: {entry}"
    if path.is_dir():
        found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
        problem = f"folder {entry} holds no {' or '.join(patterns)}"
    elif glob.has_magic(entry):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        problem = f"no file matches {entry}"
    if not found:
        raise DataError(problem, where="data.path")
    return found


# --- readers ---------------------------------------------------------------------------------------------------


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]  # never entered, as they may be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_whole_files(config: SourceConfig, position: Position) -> Iterator[tuple[Chunk, Position]]:
    parse = _python_files if config.source == "stdlib" else _text_files
    files = source_files(config)
    batch: list[tuple[str, bytes]] = []
    batch_bytes, bytes_read = 0, position.get("bytes", 0)
    for index in range(position.get("file", 0), len(files)):
        path = files[index]
        try:
            with open_decompressed(path) as (stream, raw):
                content = stream.read()
                bytes_read += raw.tell()
        except DataError:
            if config.source != "stdlib":
                raise
            continue
        batch.append((str(path), content))
        batch_bytes += len(content)
        if batch_bytes >= CHUNK_BYTES or len(batch) >= _CHUNK_FILES:
            yield partial(parse, batch), {"file": index + 1, "bytes": bytes_read}
            batch, batch_bytes = [], 0
    if batch:
        yield partial(parse, batch), {"file": len(files), "bytes": bytes_read}


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _text_files(batch: list[tuple[str, bytes]], key: str) -> Iterator[Record]:
    for path, content in batch:
        try:
            yield content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield DataError(f"{path}: not UTF-8 text (byte {error.start})")


def _python_files(batch: list[tuple[str, bytes]], key: str) -> Iterator[Record]:
    for _, content in batch:
        try:
            yield content.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:  # a few modules are in other encodings on purpose
            continue


def _read_jsonl(config: SourceConfig, position: Position) -> Iterator[tuple[Chunk, Position]]:
    files = source_files(config)
    first_file = position.get("file", 0)
    bytes_before = sum(map(_file_bytes, files[:first_file]))
    offset, line = position.get("offset", 0), position.get("line", 0)
    for index in range(first_file, len(files)):
        path = files[index]
        with open_decompressed(path) as (stream, raw):
            _skip(stream, offset)
            while block := stream.read(CHUNK_BYTES):
                block += stream.readline()
                chunk = partial(_json_lines, str(path), line + 1, block)
                offset += len(block)
                line += block.count(b"\n")
                yield chunk, {"file": index, "offset": offset, "line": line, "bytes": bytes_before + raw.tell()}
            bytes_before += raw.tell()
        offset = line = 0


def _json_lines(path: str, first_line: int, block: bytes, key: str) -> Iterator[Record]:
    for number, line in enumerate(block.split(b"\n"), first_line):
        record_json = line.removeprefix(codecs.BOM_UTF8)  # files may have been joined, each with a byte order mark
        if record_json.strip():
            where = f"{path}:{number}"
            try:
                record = json_object(record_json, where, f"an object with the key {key!r}")
                if key not in record:
                    raise _missing_key(where, key, list(record))
                yield _text_of_value(record[key], where, key)
            except DataError as error:
                yield error


def json_object(line: bytes, where: str, wanted: str) -> dict[str, Any]:
    """Return the object on a line of JSON. Raises DataError, which says that a line must be what `wanted` describes."""
    try:
        record = json.loads(line.decode())  # given bytes, json would guess UTF-16 and let surrogates through
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start} of the line)", where=where) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({one_line(error)})", where=where) from None
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}; each line must be {wanted}", where=where)
    return record


def _read_parquet(config: SourceConfig, position: Position) -> Iterator[tuple[Chunk, Position]]:
    import pyarrow as pa
    from pyarrow import parquet

    files = source_files(config)
    first_file = position.get("file", 0)
    bytes_before = sum(map(_file_bytes, files[:first_file]))
    first_group, rows_to_skip = position.get("group", 0), position.get("row", 0)
    for index in range(first_file, len(files)):
        path = files[index]
        file_bytes = _file_bytes(path)
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if config.text_key not in names:
                    raise _missing_key(str(path), config.text_key, names)
                group_start = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
                for group in range(first_group, file.num_row_groups):
                    group_rows = file.metadata.row_group(group).num_rows
                    values: list[object] = []
                    row = value_bytes = 0  # rows read of this group, bytes of `values`
                    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[config.text_key]):
                        column = batch.column(0)[max(0, rows_to_skip - row) :]
                        row += len(batch)
                        value_bytes += column.nbytes
                        values += python_values(column)
                        if values and (value_bytes >= CHUNK_BYTES or row >= group_rows):
                            chunk = partial(_texts, (str(path), "row"), group_start + row - len(values), values)
                            groups_read = group + row / group_rows
                            bytes_read = bytes_before + int(file_bytes * groups_read / file.num_row_groups)
                            yield chunk, {"file": index, "group": group, "row": row, "bytes": bytes_read}
                            values, value_bytes = [], 0
                    group_start += group_rows
                    rows_to_skip = 0
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None
        bytes_before += file_bytes
        first_group = rows_to_skip = 0


def python_values(column: Any) -> list[object]:
    """Return the values of an Arrow array. A text that is not UTF-8 is returned as bytes; the others stay text."""

    def python_value(value: Any) -> object:
        try:
            return value.as_py()
        except UnicodeDecodeError:
            return value.as_buffer().to_pybytes()

    return [python_value(value) for value in column]


def _texts(where: tuple[str, str], first_row: int, values: list[object], key: str) -> Iterator[Record]:
    """Yield the text of each value, or an error whose place is `where` with the row's number after it."""
    for number, value in enumerate(values, first_row):
        try:
            if isinstance(value, DataError):
                raise value
            yield _text_of_value(value, (where[0], f"{where[1]} {number}"), key)
        except DataError as error:
            yield error


def _read_hub(config: SourceConfig, position: Position) -> Iterator[tuple[Chunk, Position]]:
    stream = load_hub(config)
    if position:
        stream.load_state_dict(position["state"])
    where = ("data.path", f"{config.path!r} row")
    row = position.get("rows", 0)
    values: list[object] = []
    characters = 0
    records = iter(stream)
    while True:
        try:
            record = next(records, None)
            is_full = record is None or characters >= CHUNK_BYTES or len(values) >= _CHUNK_ROWS
            state = stream.state_dict() if is_full else None
        except Exception as error:
            place = "".join(f"{file}: " for file in _file_being_read(error))
            raise DataError(f"reading {config.path!r} failed: {place}{one_line(error)}", where="data.path") from None
        if record is not None:
            value = record.get(config.text_key)
            if config.text_key not in record:
                value = _missing_key((where[0], f"{where[1]} {row}"), config.text_key, list(record))
            row += 1
            values.append(value)
            characters += len(value) if isinstance(value, str) else 0
        if values and is_full:
            yield partial(_texts, where, row - len(values), values), {"rows": row, "state": state, "bytes": 0}
            values, characters = [], 0
        if record is None:
            return


def _file_being_read(error: Exception) -> list[str]:
    """Return the file that `datasets` was reading, or nothing. Its errors do not name the file; its frames may."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "file" in frame.f_locals]
    modules = "datasets.packaged_modules."
    return [str(frame.f_locals["file"]) for frame in frames if frame.f_globals["__name__"].startswith(modules)][-1:]


def load_hub(config: SourceConfig) -> Any:
    """Return a `datasets.IterableDataset`, which needs little memory and no copy on the disk. Raises DataError."""
    import datasets

    name = str(config.path)
    folder = Path(name).expanduser()
    try:
        is_saved_to_disk = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        if is_saved_to_disk:
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if config.split not in saved:
                    allowed = ", ".join(saved)
                    raise DataError(f"{name} has no split {config.split!r}; allowed: {allowed}", where="data.split")
                saved = saved[config.split]
            return saved.to_iterable_dataset()
        location = str(folder) if folder.is_dir() else name
        builder = datasets.load_dataset_builder(location, config.subset, revision=config.revision)
        # By default Parquet's batch size is the number of rows of the first row group, which may be 0.
        if getattr(builder.config, "batch_size", 0) is None:
            builder.config.batch_size = _CHUNK_ROWS
        return builder.as_streaming_dataset(split=config.split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot load data set {name!r}: {one_line(error)}", where="data.path") from None


def _text_of_value(value: object, where: str | tuple[str, str], key: str) -> str:
    if value is None:  # null is an empty document
        return ""
    if isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text (byte {error.start})", where=where) from None
    if not isinstance(value, str):
        raise DataError(f"{key!r} is a {type(value).__name__}, must be text; see ", "data.text_key", where=where)
    return printable(value)


def _missing_key(where: str | tuple[str, str], key: str, names: list[str]) -> DataError:
    allowed = f" to one of: {', '.join(map(str, names)) or '(none)'}"
    return DataError(f"no key {key!r}; set ", "data.text_key", allowed, where=where)


def printable(text: str) -> str:
    """Return a text that UTF-8 can hold: half a surrogate pair, as JSON may escape it, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_READERS: dict[str, Callable[[SourceConfig, Position], Iterator[tuple[Chunk, Position]]]] = {
    "stdlib": _read_whole_files,
    "text": _read_whole_files,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hub": _read_hub,
}


def _skip(stream: BinaryIO, offset: int) -> None:
    if stream.seekable():  # the standard library's decompressors are: they read up to the offset
        stream.seek(offset)
        return
    while offset:
        offset -= len(stream.read(min(offset, CHUNK_BYTES))) or offset
