"""Collect the held-out evaluations of runs: step, held-out loss, and of each inhibited layer MS of the top share and S.

    python launch/studies/evidence/curves.py OUTPUT.csv RUN [RUN ...]

The layers are those of the first run.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from l2e_ds.run_directory.metrics import of_kind, read_lines

MEASURE = re.compile(r"layer\d+/(top_share_score|mean_s)")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    runs = [Path(word) for word in sys.argv[2:]]
    evaluations = {run: of_kind(read_lines(run), "evaluation") for run in runs}
    keys = ["held_out_loss", *(key for key in evaluations[runs[0]][0] if MEASURE.fullmatch(key))]
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "step", *keys])
        for run, lines in evaluations.items():
            for line in lines:
                values = (f"{line[key]:.6f}" if key in line else "" for key in keys)
                writer.writerow([run.name, line["step"], *values])


if __name__ == "__main__":
    main()
