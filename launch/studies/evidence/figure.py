"""Draw the figure of docs/results.md: what each way of inhibiting does to MS and to the held-out loss.

    python launch/studies/evidence/figure.py RESULTS.csv FIGURE.svg

RESULTS.csv is a study's. A small dot is a run against the baseline run of its seed, a large one the mean over seeds.
The shaded area is what the rule of main.yaml allows; it also bounds mean S, which is not drawn.
"""

from __future__ import annotations

import sys

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

MS, LOSS = "top_share_score", "held_out_loss"
LOWER_BY, WORSE_BY = -20, 0.5  # percent, of the rule


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the relative changes of MS and held-out loss of each finished run that has a finished baseline, in %."""
    table = table[table["state"] == "done"]
    columns = {}
    for column in (MS, LOSS):
        base = table["baseline"].map(table.set_index("run")[column])
        columns[column] = 100 * (table[column] / base - 1)
    return table[["combination"]].assign(**columns).dropna()


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    found = changes(pd.read_csv(sys.argv[1]))
    if found.empty:
        sys.exit(f"{sys.argv[1]}: no finished run with a finished baseline")
    mpl.rcParams.update({"svg.hashsalt": "l2e-ds", "svg.fonttype": "none", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.axvline(0, color="0.6", linewidth=0.8)
    for name, runs in found.groupby("combination", sort=False):
        mean = runs[[MS, LOSS]].mean()
        dots = axes.scatter(runs[MS], runs[LOSS], s=12, alpha=0.6)
        axes.scatter(mean[MS], mean[LOSS], s=70, color=dots.get_facecolor(), alpha=1, label=f"{name} (n = {len(runs)})")
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    left, low, high = min(left, LOWER_BY - 10), min(low, -WORSE_BY), max(high, WORSE_BY + 0.1)
    axes.add_patch(Rectangle((left, low), LOWER_BY - left, WORSE_BY - low, color="tab:green", alpha=0.1, linewidth=0))
    axes.set(xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="MS of the top share, change in %", ylabel="held-out loss, change in %")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
