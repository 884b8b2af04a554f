"""Read what the user types and print what the user reads.

Messages go to stderr; a terminal that is gone, a closed pipe or a full disk behind it must not end a run.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO, TypeVar

from l2e_ds.errors import ConfigError, L2EError

Given = TypeVar("Given", bound=int | None)

OF_THE_USER = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
}
"""Errors of the system that the user can mend: permissions, full disks, names."""
READER_IS_GONE = 141
"""The exit code when nobody reads standard output any more: what a shell reports of a process that SIGPIPE ended."""


def reader_is_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more (`| head`); then write nothing more to it."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in watch.poll(0))
    if gone:
        _drop(sys.stdout)  # what Python writes at its end
    return gone


def open_streams() -> None:
    """Open standard streams that cron or a daemon has closed, so that what is printed there goes nowhere. Else files of
    the run would get their numbers. What the encoding of standard output lacks is written as an escape. Commands begin
    with this."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # Python's sign of a closed stream
            stream = open(os.devnull, "r+" if number else "r", encoding="utf-8")  # noqa: SIM115 (stays open)
            os.dup2(stream.fileno(), number)
            os.set_inheritable(number, True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name that it cannot write ends no command


def flush_streams() -> None:
    """Flush standard output and error, and drop what cannot be written: Python would end with exit code 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Discard what is in the buffer of a stream, and what is written to it from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    """Print one line, if that is still possible."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Print one line as a warning, if that is still possible."""
    say(f"l2e-ds: warning: {line}")


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint that names the known word most like the given one; `otherwise`, if none is."""
    close = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def duration(seconds: float) -> str:
    """Return a time in the two largest of its units: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, the first column aligned to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Return the label and value of each row on a line, with all values below each other."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def at_least(option: str, value: Given, least: int, at_most: int | None = None) -> Given:
    """Return the value of an option, which may be None. Raises ConfigError if it is out of range."""
    if value is not None and (value < least or (at_most is not None and value > at_most)):
        limit = "" if at_most is None or value < least else f" and <= {at_most}"
        raise ConfigError(f"{option}: got {value}, allowed: an integer >= {least}{limit}")
    return value


class CommandParser(argparse.ArgumentParser):
    """Parses arguments, also of sub-commands, without abbreviations: no mistyped option is taken for another one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})


def add_run_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `run_file`, a path or the name of a recipe, and `overrides`, a list of section.key=value."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="a run file, or the name of a recipe: pythia-70m")
    help_of_overrides = "change one value of the run file"
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=help_of_overrides)


def words_of_command(argv: Sequence[str] | None) -> list[str]:
    """Return a command's words (None: this process's), without the `--local_rank=N` with which the deepspeed launcher
    begins them."""
    words = list(sys.argv[1:] if argv is None else argv)
    return words[1:] if words and words[0].startswith("--local_rank=") else words


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `--`, and those after it."""
    words = list(words)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse as `parse_args` does, but let overrides follow options, too (`RUN.yaml --dry-run section.key=value`)."""
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or not hasattr(arguments, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def exit_code_of(action: Callable[[], int]) -> int:
    """Run a command and return its exit code; for an error that the user can fix, print one line on stderr."""
    try:
        return action()
    except L2EError as error:
        say(f"l2e-ds: error: {error}")
        return error.exit_code
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        return READER_IS_GONE
    except OSError as error:
        if error.errno not in OF_THE_USER:
            raise
        where = f"{error.filename}: " if error.filename else ""
        say(f"l2e-ds: error: {where}{error.strerror}")
        return ConfigError.exit_code
    except KeyboardInterrupt:  # `train` handles it itself, with a longer message
        say("l2e-ds: interrupted")
        return 130
