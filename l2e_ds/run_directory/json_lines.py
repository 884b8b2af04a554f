"""Read and extend the JSON Lines files of a run directory, to which another process may be appending."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BROKEN = object()
"""The value of a line that is not JSON."""


class Line(NamedTuple):
    """Holds one line. number: counted from 1; raw: its bytes without the end; value: its JSON value, or BROKEN."""

    number: int
    raw: bytes
    value: Any


def json_lines(path: Path) -> Iterator[Line]:
    """Yield the lines that are not empty. Raises OSError.

    A last line without an end that is not JSON is still being written, or was cut off by a kill: it is left out.
    """
    lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, start=1):
        try:
            value = json.loads(raw.decode())  # given bytes, json would guess the encoding
        except ValueError:
            value = BROKEN
        if raw and (value is not BROKEN or number < len(lines)):
            yield Line(number, raw, value)


def append_line(path: Path, value: Any) -> None:
    """Append a value as one line, also after one that was cut off by a kill. Raises OSError."""
    with path.open("ab+") as file:
        end = file.tell()
        file.seek(max(0, end - 1))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(value).encode() + b"\n")
