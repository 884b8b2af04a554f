"""`python -m benchmarks NAME`: measure the speed, memory or reliability that the documentation reports."""

from __future__ import annotations

from importlib import import_module

import benchmarks
from l2e_ds.console import CommandParser, exit_code_of, open_streams
from l2e_ds.system.process import leave_process


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and return its exit code."""
    open_streams()
    parser = CommandParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, (module, purpose) in benchmarks.NAMES.items():
        benchmark = import_module(module)
        one = names.add_parser(name, help=purpose, description=benchmark.__doc__)
        benchmark.add_arguments(one)
        one.set_defaults(action=benchmark.run)
    arguments = parser.parse_args(argv)
    return exit_code_of(lambda: arguments.action(arguments))


if __name__ == "__main__":
    leave_process(main())
