"""Collect the held-out evaluations of runs: step, held-out loss, and of each inhibited layer MS of the top share and S.

python launch/studies/evidence/curves.py OUTPUT.csv RUN [RUN ...]
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

LAYERS = (2, 3)
KEYS = ["held_out_loss", *(f"layer{layer}/{name}" for name in ("top_share_score", "mean_s") for layer in LAYERS)]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "step", *KEYS])
        for run in map(Path, sys.argv[2:]):
            for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
                if line["kind"] == "evaluation":
                    values = (f"{line[key]:.6f}" if key in line else "" for key in KEYS)
                    writer.writerow([run.name, line["step"], *values])


if __name__ == "__main__":
    main()
