"""`l2e-ds doctor`: what this machine and this launch offer a run, and the line that mends what is missing.

Also `python -m l2e_ds.doctor`, alone or under a launcher as `l2e_ds.train`. Exit code 0 where a run can start, 1 where
something it cannot do without is missing. Only the standard library is imported at the top: it must run where the rest
is broken. Never prints a token.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l2e_ds.console import CommandParser
from l2e_ds.doctor.finding import Finding, checked, conclude, seconds
from l2e_ds.doctor.machine import (
    check_accelerator,
    check_backend,
    check_directory,
    check_hub,
    check_limits,
    check_mpi,
    check_shared_memory,
    check_slurm,
    check_ssh,
)
from l2e_ds.doctor.ranks import meet_to_compare, why_no_all_reduce
from l2e_ds.doctor.software import check_compiler, check_extras, check_imports, check_operations, check_versions

if TYPE_CHECKING:
    from l2e_ds.distributed.launch import Launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="where a run would write (default: the current folder)"
    )
    parser.add_argument("--seconds", type=seconds, default=10.0, help="how long to all-reduce (default: 10)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="l2e-ds doctor", description=str(__doc__).splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Print the findings one after another; 1 where a run could not start, else 0."""
    imports = checked("imports", check_imports)
    if any(finding.name == "torch" for finding in imports):  # then there are no ranks that could meet
        shown = list(_local_findings(imports, None, arguments.directory))
        return conclude(shown, shown)

    from l2e_ds.distributed.launch import find_launch
    from l2e_ds.errors import ConfigError

    try:
        launch = find_launch()
    except ConfigError as error:  # then nobody knows which process should speak for all
        print(Finding("missing", "launcher", str(error)), flush=True)
        return 1
    shown = []
    if launch.local_rank == 0:  # what is true of a host is looked at once
        show = print if launch.rank == 0 else (lambda *_, **__: None)
        for finding in _local_findings(imports, launch, arguments.directory):
            shown.append(finding)
            show(finding, flush=True)
    try:
        return meet_to_compare(launch, shown, arguments)
    except Exception as error:  # the others may wait for this rank for ever: the launcher must end them
        failed = why_no_all_reduce(error, launch, shown)
        if launch.rank == 0:
            conclude([*shown, failed], [failed])
        else:
            print(failed, flush=True)
        os._exit(1)


def _local_findings(imports: list[Finding], launch: Launch | None, directory: Path) -> Iterator[Finding]:
    """Findings about this host, one after another as they are made."""
    if launch is not None:
        size = "a group of one" if launch.size == 1 else f"{launch.size} ranks"
        yield Finding("ok", "launcher", f"{launch.launcher}: {size}")
    yield from checked("versions", check_versions)
    yield from checked("extras", check_extras)
    yield from imports
    if not any(finding.state == "missing" for finding in imports):
        for name, check in {
            "accelerator": check_accelerator,
            "backend": check_backend,
            "compiler": check_compiler,
            "operations": check_operations,
        }.items():
            yield from checked(name, check)
    needs_mpi = launch is not None and launch.launcher == "mpirun" and "MASTER_ADDR" not in os.environ
    yield from checked("mpi", lambda: check_mpi(needs_mpi))
    yield from checked("slurm", check_slurm)
    yield from checked("ssh", check_ssh)
    yield from checked("directory", lambda: check_directory(directory))
    yield from checked("hub", check_hub)
    yield from checked("memory", check_shared_memory)
    yield from checked("limits", check_limits)
    yield Finding("ok", "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
