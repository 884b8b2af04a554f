"""What features.py, layers.py and measure.py share: the main study's layers, held-out text, and resumable files."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2e_ds.config.reading import load_run_config
from l2e_ds.data import PreparedData, prepare_sets
from l2e_ds.evaluation.model_source import find_model, load_causal_model

LAYERS, SHARE = "mid-2", 0.02  # which the main study inhibits
SEQUENCES, BATCH = 64, 32  # held-out sequences of each source, as in its evaluations; of a forward pass


def load_run(run: Path) -> tuple[Any, list[PreparedData]]:
    """Return the model of a run's newest checkpoint, in float32, and the sets that it was trained on."""
    config = load_run_config(run / "config.yaml", [])
    model = load_causal_model(find_model(str(run)), "fp32", None)[0].eval()
    cache = Path(config.data.cache or run / "data")
    return model, prepare_sets(config.data, cache, model.config.vocab_size, SEQUENCES)


def batches(part: PreparedData, count: int) -> Iterator[Tensor]:
    """Yield the first `count` held-out sequences of a set, or all if there are fewer: tokens, int64 [B, T+1]."""
    rows = np.arange(min(count, len(part.held_out)))
    for some in np.array_split(rows, -(-len(rows) // BATCH)):
        yield torch.from_numpy(part.held_out.batch(some)).long()


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of OUTPUT.csv and RUN ..., which `write_rows` takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT.csv")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    return parser


def write_rows(arguments: argparse.Namespace, measure: Callable[[Path], dict[str, float]]) -> None:
    """Append a line of measures for each run of `parser_of` that the file does not have yet."""
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
