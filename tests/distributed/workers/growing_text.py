"""`python -m l2e_ds.train`, but the text grows after rank 0 has prepared it and before rank 1 looks at it."""

import sys
from pathlib import Path

from l2e_ds import train
from l2e_ds.distributed import collectives
from l2e_ds.system import process
from l2e_ds.training import run

real = run.prepare_sets


def prepare_sets(data, *arguments):
    if collectives.rank() == 1:
        (Path(data.path) / "more.txt").write_text("The neuron and its layer are seen by nobody else.\n" * 40)
    return real(data, *arguments)


if __name__ == "__main__":
    run.prepare_sets = prepare_sets
    process.leave_process(train.main(sys.argv[1:]))
