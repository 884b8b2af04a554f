"""Print the table of docs/results.md for a study: means, and paired differences with 95 % intervals.

    python launch/studies/evidence/tables.py RESULTS.csv [MEASURES.csv]

RESULTS.csv is the study's. Only finished runs count. A difference is to the baseline run of the same seed: in nats for
losses, relative for the rest. Its interval is Student's t over the n pairs, and is not given for one pair. MS, mean S
and kurtosis are means over the inhibited layers. MEASURES.csv, of measure.py, adds its columns.
"""

from __future__ import annotations

import math
import sys

import pandas as pd
from scipy.stats import t

from l2e_ds.console import markdown
from l2e_ds.study.collect import paired_differences

LOSSES = {"held_out_loss": "held-out loss"}
SCORES = {"top_share_score": "MS", "mean_s": "mean S", "kurtosis": "kurtosis"}
MEASURED = {"worth": "worth of the layers", "worth_selected": "of the top 2 %", "worth_random": "of 2 % at random"}


def cells(table: pd.DataFrame, column: str, is_relative: bool) -> dict[str, str]:
    """Return for each combination the mean, and behind it the paired difference and its interval."""
    form = "{:+.1%}" if is_relative else "{:+.3f}"
    key, error = ("relative", "relative_stderr") if is_relative else ("difference", "stderr")
    result = {}
    for combination, row in paired_differences(table, column).iterrows():
        text = f"{row['mean']:.3f}"
        if row["pairs"]:
            difference, half = row[key], float(t.ppf(0.975, row["pairs"] - 1)) * row[error]
            text += f" ({form.format(difference)}"
            if not math.isnan(half):
                text += f", {form.format(difference - half)} to {form.format(difference + half)}"
            text += ")"
        result[str(combination)] = text
    return result


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    table = pd.read_csv(sys.argv[1])
    table = table[table["state"] == "done"]
    losses = dict(LOSSES)
    if len(sys.argv) == 3:
        measures = pd.read_csv(sys.argv[2])
        measures["run"] = measures["run"].str.split("/").str[-1]
        table = table.merge(measures[["run", *MEASURED]], on="run", how="left")
        losses |= MEASURED
    columns = [cells(table, column, column in SCORES) for column in [*losses, *SCORES]]
    counts = table.groupby("combination", sort=False).size()
    rows = [[name, str(n), *(column[name] for column in columns)] for name, n in counts.items()]
    print(markdown(["run", "n", *losses.values(), *SCORES.values()], rows))


if __name__ == "__main__":
    main()
