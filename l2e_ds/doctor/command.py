"""`l2e-ds doctor`: what this machine and this launch offer a run, and the line that fixes what is missing.

Also `python -m l2e_ds.doctor`, alone or under a launcher as `l2e_ds.train`. Exit code 0 where a run can start, 1 where
something it cannot do without is missing. Only the standard library is imported at the top: it must run where the rest
is broken. Never prints a token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from l2e_ds.console import CommandParser, words_of_command
from l2e_ds.distributed.launch import find_launch
from l2e_ds.doctor.finding import Finding, Report
from l2e_ds.doctor.host import check_host, check_imports
from l2e_ds.doctor.ranks import meet_to_compare, why_no_all_reduce
from l2e_ds.errors import ConfigError
from l2e_ds.system.process import prepare_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="where a run would write (default: the current folder)"
    )
    parser.add_argument("--seconds", type=_seconds, default=10.0, help="how long to all-reduce (default: 10)")


def _seconds(text: str) -> float:
    if not 0 < float(text) <= 600:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: above 0, at most 600")
    return float(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the doctor of a launcher's command line, and return the exit code."""
    parser = CommandParser(prog="l2e-ds doctor", description=str(__doc__).splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(words_of_command(argv)))


def run(arguments: argparse.Namespace) -> int:
    """Print the findings one after another; return 1 if a run could not start, else 0."""
    report, imports = Report(), list(check_imports())
    if any(finding.name == "torch" for finding in imports):  # then there are no ranks that could meet
        report.add(check_host(arguments.directory, imports))
        return report.conclude()
    if not imports:
        prepare_libraries()
    try:
        launch = find_launch()
    except ConfigError as error:  # then it is not known which process is rank 0
        print(Finding("missing", "launcher", str(error)), flush=True)
        return 1
    report.is_silent = launch.rank != 0
    size = "a group of one" if launch.size == 1 else f"{launch.size} ranks"
    report.add([Finding("ok", "launcher", f"{launch.launcher}: {size}")])
    if launch.local_rank == 0:  # what is true of a host is looked at once
        report.add(check_host(arguments.directory, imports))
    try:
        return meet_to_compare(launch, report, arguments)
    except Exception as error:  # the others may wait for this rank for ever: the launcher must end them
        report.is_silent = False
        report.add([why_no_all_reduce(error, launch, report.findings)])
        if launch.rank == 0:
            report.conclude()
        os._exit(1)
