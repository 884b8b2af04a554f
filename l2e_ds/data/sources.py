"""Where text comes from: the standard library, text files, JSON lines, Parquet, Hugging Face data sets.

`documents` yields texts in an order that depends on nothing but the configuration and the files.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from l2e_ds.config import DataConfig
from l2e_ds.data.files import one_line
from l2e_ds.data.indexed import IndexedTokens, pair
from l2e_ds.errors import DataError

# What a folder in data.path stands for.
PATTERNS = {
    "text": ("*.txt",),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.jsonl.bz2", "*.jsonl.xz", "*.jsonl.zst"),
    "parquet": ("*.parquet",),
}
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(config: DataConfig) -> Iterator[str]:
    """The non-empty documents of a text source, at most `max_documents`. Raises DataError."""
    if config.source not in _READERS:
        raise DataError(f"data.source: {config.source} holds tokens, not text; allowed: {', '.join(_READERS)}")
    texts = (_printable(text) for text in _READERS[config.source](config))
    return islice((text for text in texts if text.strip()), config.max_documents)


def check_source(config: DataConfig) -> None:
    """Raise DataError where the source is missing, unreadable at its beginning or empty. Writes nothing.

    A data set of the hub is not asked for: only a local folder's existence is checked.
    """
    if config.source == "indexed":
        if IndexedTokens(config.path or []).num_tokens == 0:
            raise DataError(f"data.path: {config.path} holds no tokens")
    elif config.source == "hub":
        if looks_local(str(config.path)) and not Path(str(config.path)).expanduser().exists():
            raise DataError(f"data.path: no such file or folder: {config.path}")
    elif next(documents(config), None) is None:
        where = f"data.path: {config.path}" if config.path else f"data.source: {_stdlib_folder()}"
        raise DataError(f"{where} holds no text")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path, not `owner/name` on the hub."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def source_files(config: DataConfig) -> list[Path]:
    """The local files of a source in reading order, each once; none for a data set of the hub.

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
    entries = [config.path] if isinstance(config.path, str) else list(config.path or [])
    if not entries:
        raise DataError("data.path: got [], give at least one file, folder or glob pattern")
    return list(dict.fromkeys(path for entry in entries for path in _matching(entry, PATTERNS[config.source])))


def _matching(entry: str, patterns: tuple[str, ...]) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
        if not found:
            raise DataError(f"data.path: folder {entry} holds no {' or '.join(patterns)}")
        return found
    if glob.has_magic(entry):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not found:
            raise DataError(f"data.path: no file matches {entry}")
        return found
    raise DataError(f"data.path: no such file or folder: {entry}")


# --- readers ----------------------------------------------------------------------------------------------------


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    root = _stdlib_folder()
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]  # not walked at all: they may be huge
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_stdlib(config: DataConfig) -> Iterator[str]:
    for path in _stdlib_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a few modules are in other encodings on purpose
            continue
        yield text


def _read_text(config: DataConfig) -> Iterator[str]:
    for path in source_files(config):
        try:
            yield path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


def _read_jsonl(config: DataConfig) -> Iterator[str]:
    import fsspec
    from fsspec.compression import compr

    for path in source_files(config):
        if path.suffix == ".zst" and "zstd" not in compr:
            raise DataError(f"{path}: zstd needs a package that is not installed; pip install zstandard")
        try:
            with fsspec.open(str(path), "rb", compression="infer") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of_line(line, f"{path}:{number}", config.text_key)
        except (OSError, EOFError, ValueError, ImportError) as error:  # the file itself: permissions, compression
            raise DataError(f"{path}: {one_line(error)}") from None


def _text_of_line(line: bytes, where: str, key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({one_line(error)})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}; each line must be an object with the key {key!r}")
    if key not in record:
        raise _missing_key(where, key, list(record))
    return _text_of_value(record[key], where, key)


def _read_parquet(config: DataConfig) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    for path in source_files(config):
        row = 0
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if config.text_key not in names:
                    raise _missing_key(str(path), config.text_key, names)
                for batch in file.iter_batches(batch_size=256, columns=[config.text_key]):
                    for value in batch.column(0).to_pylist():
                        yield _text_of_value(value, f"{path}: row {row}", config.text_key)
                        row += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({one_line(error)})") from None


def _read_hub(config: DataConfig) -> Iterator[str]:
    rows = enumerate(_load_hub(config))
    while True:
        try:
            number, record = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"data.path: reading {config.path!r} failed: {one_line(error)}") from None
        where = f"data.path: {config.path!r} row {number}"
        if config.text_key not in record:
            raise _missing_key(where, config.text_key, list(record))
        yield _text_of_value(record[config.text_key], where, config.text_key)


def _load_hub(config: DataConfig) -> Any:
    import datasets

    name = str(config.path)
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # made by save_to_disk
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if config.split not in saved:
                raise DataError(f"data.split: {name} has no split {config.split!r}; allowed: {', '.join(saved)}")
            return saved[config.split]
        return datasets.load_dataset(
            str(folder) if folder.is_dir() else name,
            config.subset,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        )
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.path: cannot load data set {name!r}: {one_line(error)}") from None


def _text_of_value(value: object, where: str, key: str) -> str:
    if value is None:  # null: an empty document
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is a {type(value).__name__}, must be text; see data.text_key")
    return value


def _missing_key(where: str, key: str, names: list[str]) -> DataError:
    return DataError(f"{where}: no key {key!r}; set data.text_key to one of: {', '.join(map(str, names)) or '(none)'}")


def _printable(text: str) -> str:
    """JSON may escape half a surrogate pair, which no UTF-8 can hold; it becomes the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


_READERS: dict[str, Callable[[DataConfig], Iterator[str]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hub": _read_hub,
}
