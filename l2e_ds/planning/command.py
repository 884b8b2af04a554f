"""`l2e-ds plan`: memory, time and traffic of a run on GPUs that one does not have, from formulae alone.

l2e-ds plan RUN.yaml --gpus 8 --gpu H100
"""

from __future__ import annotations

import argparse

from l2e_ds.console import add_run_file_arguments
from l2e_ds.system.gpus import GPUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank each")
    parser.add_argument("--gpu", required=True, metavar="TYPE", help=", ".join(GPUS))
    share = "of the peak, in a whole step (default: a range, by the model's size)"
    parser.add_argument("--mfu", type=float, metavar="SHARE", help=share)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Raises ConfigError."""
    from l2e_ds.planning.plan import describe  # only now: it imports torch, which `--help` must not wait for
    from l2e_ds.system.process import prepare_libraries

    prepare_libraries()
    print(describe(arguments.run_file, arguments.overrides, arguments.gpus, arguments.gpu, arguments.mfu))
    return 0
