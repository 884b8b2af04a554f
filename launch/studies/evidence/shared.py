"""What features.py, layers.py and measure.py share: the main study's layers, a look at neurons, and resumable files."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from l2e_ds.inhibition import NeuronSite

LAYERS, SHARE = "mid-2", 0.02  # which the main study inhibits
SEQUENCES, BATCH = 64, 32  # held-out sequences of each source, as in its evaluations; of a forward pass


@contextmanager
def replaced(sites: list[NeuronSite], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While it lasts, neurons [B, T, N] of a site are what `change` makes of them and its index; None: as they are."""
    handles = [
        getattr(site.module, site.attribute).register_forward_hook(
            lambda module, inputs, output, index=index: change(index, output)
        )
        for index, site in enumerate(sites)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT.csv")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")


def write_rows(arguments: argparse.Namespace, measure: Callable[[Path], dict[str, float]]) -> None:
    """Append a line of measures for each run of `add_arguments` that the file does not have yet."""
    output, known, columns = arguments.output, set(), None
    if output.exists():
        with output.open(newline="") as file:
            reader = csv.DictReader(file)
            known, columns = {line["run"] for line in reader}, reader.fieldnames
    with output.open("a", newline="") as file:
        for run in (given.resolve() for given in arguments.runs):
            name = f"{run.parent.parent.name}/{run.name}"
            if name not in known:
                row = {"run": name} | {key: f"{value:.6f}" for key, value in measure(run).items()}
                columns = columns or list(row)
                if set(columns) != set(row):
                    sys.exit(f"{output}: has the columns {', '.join(columns)}; {name} gives {', '.join(row)}")
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                print(name, flush=True)
