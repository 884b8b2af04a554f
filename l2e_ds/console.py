"""What the user types and reads.

Lines go to stderr; a terminal that is gone, a closed pipe or a full disk behind it must not end a run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any


def say(line: str) -> None:
    """Print one line, if that is still possible."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table, the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """On one line, and one cell."""
    return " ".join(text.split()).replace("|", "\\|")


class CommandParser(argparse.ArgumentParser):
    """Takes no option by its first letters: a mistyped one must not be another. Its sub-commands are parsed alike."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
