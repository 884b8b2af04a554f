"""`l2e-ds doctor`: what this machine and this launch offer a run, and the line that mends what is missing.

Also `python -m l2e_ds.doctor`, alone or under a launcher as `l2e_ds.train`. Exit code 0 where a run can start, 1 where
something it cannot do without is missing. Only the standard library is imported at the top: it must run where the rest
is broken. Never prints a token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l2e_ds.console import CommandParser
from l2e_ds.doctor import host
from l2e_ds.doctor.finding import Finding, checked, conclude
from l2e_ds.doctor.ranks import meet_to_compare, why_no_all_reduce
from l2e_ds.errors import ConfigError

if TYPE_CHECKING:
    from l2e_ds.distributed.launch import Launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="where a run would write (default: the current folder)"
    )
    parser.add_argument("--seconds", type=_seconds, default=10.0, help="how long to all-reduce (default: 10)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it


def _seconds(text: str) -> float:
    if not 0 < float(text) <= 600:
        raise argparse.ArgumentTypeError(f"got {text}, allowed: above 0, at most 600")
    return float(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="l2e-ds doctor", description=str(__doc__).splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Print the findings one after another; 1 where a run could not start, else 0."""
    imports = checked("imports", host.check_imports)
    if any(finding.name == "torch" for finding in imports):  # then there are no ranks that could meet
        return conclude(_look(imports, None, arguments.directory, show=True))

    from l2e_ds.distributed.launch import find_launch  # with torch, which may be missing

    try:
        launch = find_launch()
    except ConfigError as error:  # then nobody knows which process should speak for all
        print(Finding("missing", "launcher", str(error)), flush=True)
        return 1
    found = []
    if launch.local_rank == 0:  # what is true of a host is looked at once
        found = _look(imports, launch, arguments.directory, show=launch.rank == 0)
    try:
        return meet_to_compare(launch, found, arguments)
    except Exception as error:  # the others may wait for this rank for ever: the launcher must end them
        failed = why_no_all_reduce(error, launch, found)
        print(failed, flush=True)
        if launch.rank == 0:
            conclude([*found, failed])
        os._exit(1)


def _look(imports: list[Finding], launch: Launch | None, directory: Path, show: bool) -> list[Finding]:
    """Return the findings about this host, each shown as it is made."""
    needs_mpi = launch is not None and launch.launcher == "mpirun" and "MASTER_ADDR" not in os.environ
    started = []
    if launch is not None:
        size = "a group of one" if launch.size == 1 else f"{launch.size} ranks"
        started.append(Finding("ok", "launcher", f"{launch.launcher}: {size}"))
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("launcher", lambda: started),
        ("versions", host.check_versions),
        ("imports", lambda: imports),
        ("accelerator", host.check_accelerator),
        ("backend", host.check_backend),
        ("compiler", host.check_compiler),
        ("mpi", lambda: host.check_mpi(needs_mpi)),
        ("slurm", host.check_slurm),
        ("ssh", host.check_ssh),
        ("directory", lambda: host.check_directory(directory)),
        ("hub", host.check_hub),
        ("memory", host.check_shared_memory),
        ("limits", host.check_limits),
    ]
    found = []
    for name, check in checks:
        if imports and name in ("accelerator", "backend", "compiler"):  # which ask torch and DeepSpeed
            continue
        for finding in checked(name, check):
            found.append(finding)
            if show:
                print(finding, flush=True)
    return found
