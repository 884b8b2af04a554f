"""Lines for the user on stderr. A terminal that is gone, a closed pipe or a full disk behind it must not end a run."""

from __future__ import annotations

import contextlib
import sys


def say(line: str) -> None:
    """Print one line, if that is still possible."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
