"""Where text comes from: the standard library, text files, JSON lines, Parquet, Hugging Face data sets.

`chunks` reads about a megabyte of raw input at a time and leaves the work on it (JSON, UTF-8) to whoever calls the
chunk, which may be another process. `documents` yields texts in one process. Either way the order depends on nothing
but the configuration and the files.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import sysconfig
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from l2e_ds.config.sections import SourceConfig
from l2e_ds.data.indexed import IndexedTokens, pair
from l2e_ds.errors import DataError
from l2e_ds.system.files import one_line

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What a folder in data.path stands for.
PATTERNS = {
    "text": ("*.txt", *(f"*.txt{suffix}" for suffix in COMPRESSED)),
    "jsonl": ("*.jsonl", *(f"*.jsonl{suffix}" for suffix in COMPRESSED)),
    "parquet": ("*.parquet",),
}
CHUNK_BYTES = 1 << 20  # large enough that handing it to another process costs nothing, small enough for memory
_CHUNK_FILES = 256
_CHUNK_ROWS = 1024
_BATCH_ROWS = 64  # of Parquet, decoded at once
_DECODER = json.JSONDecoder()
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


Record = str | DataError
"""A document, or why it is none (where, what was given, what is allowed)."""
Chunk = Callable[[str], Iterator[Record]]
"""Some raw input; called with the text key it gives its records in order. Can be sent to another process."""
Position = dict[str, Any]
"""Where reading goes on after a chunk; JSON-able. `bytes`: how much of the input files has been read."""


def chunks(config: SourceConfig, position: Position | None = None) -> Iterator[tuple[Chunk, Position]]:
    """The input in order, from a position on; with each chunk the position after it. Raises DataError."""
    if config.source not in _READERS:
        raise DataError(f"{config.source} holds tokens, not text; allowed: {', '.join(_READERS)}", where="data.source")
    return _READERS[config.source](config, position or {})


def documents(config: SourceConfig, skip_bad: bool = False) -> Iterator[str]:
    """The non-empty documents of a text source, at most `max_documents`. Raises DataError."""

    raw = chunks(config)

    def texts() -> Iterator[str]:
        for chunk, _ in raw:
            for record in chunk(config.text_key):
                if not isinstance(record, DataError):
                    yield record
                elif not skip_bad:
                    raise record

    return islice((text for text in texts() if text.strip()), config.max_documents)


def input_bytes(config: SourceConfig) -> int | None:
    """Size of all local files together, None for a data set of the hub."""
    files = source_files(config)
    return sum(map(_size, files)) if files else None


def check_source(config: SourceConfig) -> None:
    """Raise DataError where the source is missing, unreadable at its beginning or empty. Writes nothing.

    A data set of the hub is not asked for: only a local folder's existence is checked.
    """
    if config.source == "indexed":
        if IndexedTokens(config.path or []).num_tokens == 0:
            raise DataError(f"{name_of(config)} holds no tokens", where="data.path")
    elif config.source == "hub":
        if looks_local(str(config.path)) and not Path(str(config.path)).expanduser().exists():
            raise DataError(f"no such file or folder: {config.path}", where="data.path")
    elif next(documents(config), None) is None:
        key, name = ("data.path", name_of(config)) if config.path else ("data.source", _stdlib_folder())
        raise DataError(f"{name} holds no text", where=key)


def name_of(config: SourceConfig) -> str:
    """For messages: the path or paths, or the kind of source."""
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
        prefixes = [config.path] if isinstance(config.path, str) else config.path or []
        return [file for prefix in prefixes for file in pair(prefix)]
    if config.source == "hub":
        folder = Path(str(config.path)).expanduser()
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    files: dict[Path, Path] = {}
    for path in _named(config):
        files.setdefault(path.resolve(), path)
    plain: dict[Path, Path] = {}
    for path in files.values():
        name = path.stem if path.suffix in COMPRESSED else path.name
        other = plain.setdefault(path.parent.resolve() / name, path)
        if other != path:
            raise DataError(
                f"{other} and {path} are the same text twice, by their names; remove or rename one of them",
                where="data.path",
            )
    return list(files.values())


def _named(config: SourceConfig) -> list[Path]:
    """Return files as the entries of data.path name them, some perhaps several times. Raises DataError."""
    if not _entries(config):
        raise DataError("got [], give at least one file, folder or glob pattern", where="data.path")
    return [path for entry in _entries(config) for path in _matching(entry, PATTERNS[str(config.source)])]


def _entries(config: SourceConfig) -> list[str]:
    return [config.path] if isinstance(config.path, str) else list(config.path or [])


def passed_over(config: SourceConfig) -> str | None:
    """Return a line about files of data.path that are not read, or not each time they are named. Raises DataError."""
    if config.source not in PATTERNS:
        return None
    files, named = source_files(config), _named(config)
    read = {path.resolve() for path in files}
    below: set[Path] = set()
    beside: set[Path] = set()
    for entry in _entries(config):
        path = Path(entry).expanduser()
        matched = [] if "**" in entry else map(Path, glob.glob(str(path)))
        for folder in [path] if path.is_dir() else filter(Path.is_dir, matched):
            for place, _, names in os.walk(folder):
                found = {Path(place, name).resolve() for name in names} - read
                (beside if Path(place) == path else below).update(found)
    suffixes = ", ".join(sorted({path.suffix or path.name for path in beside})[:5])
    parts = {
        f"{len(beside):,} of other kinds ({suffixes})": len(beside),
        f"{len(below - beside):,} in subfolders": len(below - beside),
        f"{len(named) - len(files):,} named more than once": len(named) - len(files),
    }
    counted = ", ".join(text for text, count in parts.items() if count)
    return f"{name_of(config)}: {len(files):,} read; files passed over: {counted}" if counted else None


def _matching(entry: str, patterns: tuple[str, ...]) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
        if not found:
            raise DataError(f"folder {entry} holds no {' or '.join(patterns)}", where="data.path")
        return found
    if glob.has_magic(entry):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not found:
            raise DataError(f"no file matches {entry}", where="data.path")
        return found
    raise DataError(f"no such file or folder: {entry}", where="data.path")


# --- readers ---------------------------------------------------------------------------------------------------
# A position's keys: `file`, index of the file to read next; `offset` bytes (decompressed) and `line` lines of it that
# are done; `group` and `row` of a Parquet file; `rows` done and `state` of a data set of the hub; `bytes`.


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    root = _stdlib_folder()
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]  # not walked at all: they may be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_whole_files(config: SourceConfig, position: Position) -> Iterator[tuple[Chunk, Position]]:
    parse = _python_files if config.source == "stdlib" else _text_files
    files = source_files(config)
    batch: list[tuple[str, bytes]] = []
    held, done = 0, position.get("bytes", 0)
    for index in range(position.get("file", 0), len(files)):
        path = files[index]
        try:
            with opened(path) as (stream, raw):
                content = stream.read()
                done += raw.tell()
        except DataError:
            if config.source != "stdlib":
                raise
            continue
        batch.append((str(path), content))
        held += len(content)
        if held >= CHUNK_BYTES or len(batch) >= _CHUNK_FILES:
            yield partial(parse, batch), {"file": index + 1, "bytes": done}
            batch, held = [], 0
    if batch:
        yield partial(parse, batch), {"file": len(files), "bytes": done}


def _size(path: Path) -> int:
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
    before = sum(_size(path) for path in files[: position.get("file", 0)])
    for index in range(position.get("file", 0), len(files)):
        path = files[index]
        going_on = index == position.get("file")
        offset, line = (position.get("offset", 0), position.get("line", 0)) if going_on else (0, 0)
        with opened(path) as (stream, raw):
            _skip(stream, offset)
            while block := stream.read(CHUNK_BYTES):
                block += stream.readline()
                chunk = partial(_json_lines, str(path), line + 1, block)
                offset, line = offset + len(block), line + block.count(b"\n")
                yield chunk, {"file": index, "offset": offset, "line": line, "bytes": before + raw.tell()}
            before += raw.tell()


def _json_lines(path: str, first: int, block: bytes, key: str) -> Iterator[Record]:
    for number, line in enumerate(block.split(b"\n"), first):
        for part in _parts(line):
            try:
                yield _text_of_line(part, f"{path}:{number}", key)
            except DataError as error:
                yield error


def _parts(line: bytes) -> list[bytes]:
    """Return the records of a line.

    Behind one a byte order mark and the next may stand: files were joined, and the last line of the first had no end.
    """
    if codecs.BOM_UTF8 not in line:
        return [line] if line.strip() else []
    parts = []
    text = line.decode(errors="surrogateescape")
    while text := text.strip("\ufeff \t\r"):
        try:
            _, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            end = len(text)
        if not text[end:].lstrip().startswith("\ufeff"):
            end = len(text)
        parts.append(text[:end].encode(errors="surrogateescape"))
        text = text[end:]
    return parts


def json_object(line: bytes, where: str, wanted: str) -> dict[str, Any]:
    """Return the object on a line of JSON. wanted: what an error asks for. Raises DataError."""
    try:
        record = json.loads(line.decode())  # given bytes, json would guess UTF-16 and let surrogates through
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text (byte {error.start} of the line)", where=where) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({one_line(error)})", where=where) from None
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}; each line must be {wanted}", where=where)
    return record


def _text_of_line(line: bytes, where: str, key: str) -> str:
    record = json_object(line, where, f"an object with the key {key!r}")
    if key not in record:
        raise _missing_key(where, key, list(record))
    return _text_of_value(record[key], where, key)


def _read_parquet(config: SourceConfig, position: Position) -> Iterator[tuple[Chunk, Position]]:
    import pyarrow as pa
    from pyarrow import parquet

    files = source_files(config)
    before = sum(_size(path) for path in files[: position.get("file", 0)])
    for index in range(position.get("file", 0), len(files)):
        path, size = files[index], _size(files[index])
        going_on = index == position.get("file")
        first_group, skipped = (position["group"], position["row"]) if going_on else (0, 0)
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if config.text_key not in names:
                    raise _missing_key(str(path), config.text_key, names)
                start = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
                for group in range(first_group, file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    values: list[object] = []
                    row = held = 0  # rows of this group read so far, bytes in `values`
                    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[config.text_key]):
                        column = batch.column(0)[max(0, skipped - row) :]
                        row += len(batch)
                        held += column.nbytes
                        values += python_values(column)
                        if values and (held >= CHUNK_BYTES or row >= count):
                            chunk = partial(_values, (str(path), "row"), start + row - len(values), values)
                            read = before + int(size * (group + row / count) / file.num_row_groups)
                            yield chunk, {"file": index, "group": group, "row": row, "bytes": read}
                            values, held = [], 0
                    start, skipped = start + count, 0
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None
        before += size


def python_values(column: Any) -> list[object]:
    """Of an Arrow array; bytes where a text is not UTF-8, so that the others are not lost with it."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_python_value(value) for value in column]


def _python_value(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _values(where: tuple[str, str], first: int, values: list[object], key: str) -> Iterator[Record]:
    """where: the number of the row is put after it."""
    for number, value in enumerate(values, first):
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
    done = position.get("rows", 0)
    values: list[object] = []
    held = 0
    rows = iter(stream)
    while True:
        try:
            record = next(rows, None)
            state = stream.state_dict() if record is None or held >= CHUNK_BYTES or len(values) >= _CHUNK_ROWS else None
        except Exception as error:
            place = "".join(f"{file}: " for file in _files_of(error))
            raise DataError(f"reading {config.path!r} failed: {place}{one_line(error)}", where="data.path") from None
        if record is not None:
            value = record.get(config.text_key)
            if config.text_key not in record:
                value = _missing_key((where[0], f"{where[1]} {done + len(values)}"), config.text_key, list(record))
            values.append(value)
            held += len(value) if isinstance(value, str) else 0
        if values and state is not None:
            yield partial(_values, where, done, values), {"rows": done + len(values), "state": state, "bytes": 0}
            done, values, held = done + len(values), [], 0
        if record is None:
            return


def _files_of(error: Exception) -> list[str]:
    """Return the file that `datasets` was reading, where its frames tell: its errors do not."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "file" in frame.f_locals]
    modules = "datasets.packaged_modules."
    return [str(frame.f_locals["file"]) for frame in frames if frame.f_globals["__name__"].startswith(modules)][-1:]


def load_hub(config: SourceConfig) -> Any:
    """Return a `datasets.IterableDataset`: memory stays flat, and no copy is made on the disk."""
    import datasets

    name = str(config.path)
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # made by save_to_disk
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if config.split not in saved:
                    raise DataError(
                        f"{name} has no split {config.split!r}; allowed: {', '.join(saved)}", where="data.split"
                    )
                saved = saved[config.split]
            return saved.to_iterable_dataset()
        builder = datasets.load_dataset_builder(
            str(folder) if folder.is_dir() else name, config.subset, revision=config.revision
        )
        if (
            getattr(builder.config, "batch_size", 0) is None
        ):  # Parquet: else the rows of its first group, which may be 0
            builder.config.batch_size = _CHUNK_ROWS
        return builder.as_streaming_dataset(split=config.split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot load data set {name!r}: {one_line(error)}", where="data.path") from None


def _text_of_value(value: object, where: str | tuple[str, str], key: str) -> str:
    if value is None:  # null: an empty document
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
    """JSON may escape half a surrogate pair, which no UTF-8 can hold; it becomes the replacement character."""
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


# --- compressed files --------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream of a file and the file itself, whose `tell` says how much of it has been read.

    Raises DataError for what goes wrong inside the block with the file: permissions, a truncated or foreign format.
    """
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as stream:
            yield stream, raw
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from None


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".bz2":
        return bz2.BZ2File(raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw), CHUNK_BYTES)
    return nullcontext(raw)


class _Zstandard(io.RawIOBase):
    """Several frames one after the other, as parallel compressors write them; the library's own reader ends after the
    first, and takes a truncated file for a complete one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._failed = raw, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._failed as error:
                raise OSError(f"Not a zstd file ({one_line(error)})") from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _skip(stream: BinaryIO, offset: int) -> None:
    if stream.seekable():  # of a compressed one: reads to there
        stream.seek(offset)
        return
    while offset:
        offset -= len(stream.read(min(offset, CHUNK_BYTES))) or offset
