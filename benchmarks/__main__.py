"""`python -m benchmarks NAME`: measure the speed, memory or reliability that the documentation reports."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from types import ModuleType

import benchmarks
from benchmarks.about import check_output, circumstances, publish
from l2e_ds.console import CommandParser, exit_code_of, open_streams, words_of_command
from l2e_ds.distributed.launch import Launch, run_on_launched_ranks
from l2e_ds.system.process import leave_process


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark and return its exit code."""
    open_streams()
    parser = CommandParser(prog="python -m benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (module, purpose) in benchmarks.NAMES.items():
        benchmark = import_module(module)
        one = names.add_parser(name, help=purpose, description=benchmark.__doc__)
        for key, option in benchmark.OPTIONS.items():
            option.add_to(one, key)
        if hasattr(benchmark, "add_arguments"):
            benchmark.add_arguments(one)
        default = getattr(benchmark, "OUTPUT", None)
        files = f"new or empty, for {name}.json and {name}.md"
        one.add_argument("--output", type=Path, default=default, metavar="DIR", help=f"{files} (default: {default})")
        one.set_defaults(benchmark=benchmark)
    arguments = parser.parse_args(words_of_command(argv))
    if hasattr(arguments, "overrides"):  # may also follow the names of --models
        arguments.overrides += [word for word in arguments.models if "=" in word]
        arguments.models = [word for word in arguments.models if "=" not in word]
    return exit_code_of(lambda: run(arguments.benchmark, arguments))


def run(benchmark: ModuleType, arguments: argparse.Namespace) -> int:
    """Measure on every rank; on rank 0 print and write the page. Return the exit code. Raises L2EError."""
    passed = True

    def action(launch: Launch) -> None:
        nonlocal passed
        for key, option in benchmark.OPTIONS.items():
            option.check(key, getattr(arguments, key))
        if launch.rank == 0:
            check_output(arguments.output)
        about = circumstances(arguments, benchmark.OPTIONS, benchmark.PACKAGES)
        results = about | benchmark.measure(arguments, launch)
        passed = results.get("passed", True)
        if launch.rank == 0:
            publish(arguments.output, arguments.name, results, benchmark.page(results))

    return run_on_launched_ranks(action) or int(not passed)


if __name__ == "__main__":
    leave_process(main())
