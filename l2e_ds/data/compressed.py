"""Read compressed text files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from l2e_ds.errors import DataError
from l2e_ds.system.files import one_line

_BUFFER_BYTES = 1 << 20


@contextmanager
def open_decompressed(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the decompressed stream of a file and the file itself, whose `tell` says how much of it has been read.

    Raises DataError for whatever is wrong with the file while the block runs: no permission, a truncated file, another
    format than the suffix says.
    """
    decompress = _DECOMPRESS.get(path.suffix, nullcontext)
    try:
        with open(path, "rb") as raw, decompress(raw) as stream:
            yield stream, raw
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from None


class _Zstandard(io.RawIOBase):
    """Reads a Zstandard file of several frames one after the other, as parallel compressors write them.

    The library's own reader ends after the first frame and takes a truncated file for a complete one.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._raw.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._decompressed = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(f"Not a zstd file ({one_line(error)})") from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._decompressed))
        buffer[:count], self._decompressed = self._decompressed[:count], self._decompressed[count:]
        return count


_DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(_Zstandard(raw), _BUFFER_BYTES),
}

COMPRESSED = tuple(_DECOMPRESS)
"""The suffixes of compressed files."""
