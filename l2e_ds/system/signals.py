"""Note the signals that ask this process to stop, so that it can stop at a time of its own.

There is one list a process, as there is one handler a signal. Imports nothing heavy.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

ASK_TO_STOP = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

received: list[tuple[float, signal.Signals]] = []
"""The signals received since `listen`, each with its time (time.monotonic)."""
_before: dict[signal.Signals, Any] = {}


def listen(numbers: Sequence[signal.Signals] = ASK_TO_STOP) -> None:
    """Note these signals from now on instead of dying of them, and forget earlier ones.

    SIGHUP stays ignored under nohup, and SIGINT in what a shell runs in the background.
    """
    received.clear()
    for number in numbers:
        if number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
            _before.setdefault(number, signal.signal(number, _note))


def stop_listening() -> None:
    """Give the signals back the handlers that they had before `listen`."""
    while _before:
        signal.signal(*_before.popitem())


def are_impatient() -> bool:
    """Return whether SIGINT or SIGTERM came again. Two within two seconds count as one: a terminal and a
    launcher may both send it."""
    wishes = [when for when, number in received if number in (signal.SIGINT, signal.SIGTERM)]
    return bool(wishes) and wishes[-1] > wishes[0] + 2


def _note(number: int, _frame: FrameType | None) -> None:
    received.append((time.monotonic(), signal.Signals(number)))
