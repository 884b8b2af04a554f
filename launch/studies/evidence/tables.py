"""Print the tables of docs/results.md from the files of a folder.

    python launch/studies/evidence/tables.py FOLDER

FOLDER has results.csv of the main study; all-layers.csv, long.csv, start.csv, strength.csv, choices.csv and
transfer.csv, the results of these studies; and curves.csv, layers.csv, measures.csv and features.csv of the scripts of
these names, of the main study. Of other studies these begin with the study's name, as long_curves.csv does. Only
finished runs count. A difference is to the baseline run of the same seed, relative where the table has %. Its interval
is Student's t over the n pairs, and is not given for one pair. MS, mean S and kurtosis are means over the inhibited
layers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import t

from l2e_ds.console import markdown
from l2e_ds.study.collect import paired_differences

SCORES = {"top_share_score": "MS", "mean_s": "mean S", "kurtosis": "kurtosis"}
WORTH = {
    "loss_all": "loss, all held-out text",
    "worth": "worth of the layers",
    "worth_selected": "worth of the top 2 %",
    "worth_random": "worth of 2 % at random",
}
MEASURES = WORTH | {
    "active_share": "active share",
    "layer2/mean_s": "mean S, layer 2",
    "layer3/mean_s": "mean S, layer 3",
}
FEATURES = {
    "own_ms": "mean MS on the own feature",
    "ks": "K-S",
    "ks_chance": "K-S by chance",
    "fkr": "False Killing Rate",
    "own_share": "own feature's share of a neuron's top 2 %",
    "eta2": "eta squared",
    "eta2_clipped": "eta squared, peaks clipped",
}
BY_SIZE = {"held_out_loss": "held-out loss", "top_share_score": "MS"} | {
    key: FEATURES[key] for key in ("ks", "ks_chance", "fkr", "own_share", "eta2")
}
BY_LAYER = {f"layer{layer}/top_share_score": f"MS, layer {layer}" for layer in range(6)}
ARMS = ("none", "projected-0.05", "projected-0.1", "published")
SMALLER = ["none", "published", "l2=0.1", "small-start"]
OF_ALL_LAYERS = ["none", "projected-0.05", "published", "without-mlp-all", "l2=0.1-all"]
CONTROLS = {
    "without-mlp-seed103": ("curves", "none-seed103"),
    "without-mlp-seed104": ("curves", "none-seed104"),
    "without-mlp-4800-seed103": ("curves", "none-4800-seed103"),
    "without-mlp-4800-seed104": ("long_curves", "none-seed104"),
    "without-mlp-4800-seed105": ("long_curves", "none-seed105"),
    "without-mlp-4800-seed106": ("long_curves", "none-4800-seed106"),
}
"""The file of curves of each control, and its baseline there."""


def interval(row: pd.Series, form: str) -> str:
    """Return the paired difference of a row of `paired_differences`, relative if the form has %, and its interval."""
    key, error = ("relative", "relative_stderr") if "%" in form else ("difference", "stderr")
    difference, half = row[key], float(t.ppf(0.975, row["pairs"] - 1)) * row[error]
    text = form.format(difference)
    return text if math.isnan(half) else f"{text}, {form.format(difference - half)} to {form.format(difference + half)}"


def cells(table: pd.DataFrame, column: str, is_relative: bool = False) -> dict[str, str]:
    """Return for each combination the mean, and behind it the paired difference and its interval."""
    form = "{:+.1%}" if is_relative else "{:+.3f}"
    return {
        str(combination): f"{row['mean']:.3f}" + (f" ({interval(row, form)})" if row["pairs"] else "")
        for combination, row in paired_differences(table, column).iterrows()
    }


def main_table(results: pd.DataFrame) -> str:
    scores = [column for column in SCORES if column in results]
    columns = [cells(results, "held_out_loss"), *(cells(results, column, True) for column in scores)]
    counts = results.groupby("combination", sort=False).size()
    rows = [[name, str(n), *(column[name] for column in columns)] for name, n in counts.items()]
    return markdown(["run", "n", "held-out loss", *(SCORES[column] for column in scores)], rows)


def with_controls(curves: pd.DataFrame, names: list[str]) -> str:
    """Return the `main_table` of arms and controls, in this order, from the curves of runs that have ended."""
    last = curves.groupby("run").tail(1).copy()
    last[["combination", "seed"]] = last["run"].str.extract(r"(.*)-seed(\d+)")
    last = last[last["combination"].isin(names)]
    last = last[last["step"] == last["step"].max()]
    last["baseline"] = ("none-seed" + last["seed"]).where(last["combination"] != "none")
    return main_table(last.sort_values("combination", key=lambda column: column.map(names.index)))


def by_measure(results: pd.DataFrame, own: pd.DataFrame, titles: dict[str, str], is_relative: bool = False) -> str:
    """Return a row for each measure and a column for each of ARMS. own: the measures, with the name of the run."""
    table = results[["run", "combination", "baseline"]].merge(own, on="run")
    counts = table.groupby("combination", sort=False).size()
    arms = [arm for arm in ARMS if arm in counts]
    rows = [[title, *(cells(table, column, is_relative)[arm] for arm in arms)] for column, title in titles.items()]
    return markdown(["measure", *(f"{arm} (n = {counts[arm]})" for arm in arms)], rows)


def by_step(results: pd.DataFrame, curves: pd.DataFrame, first: int) -> str:
    """Return the mean relative changes of loss and MS at each evaluation of inhibited runs from step `first` on."""
    table = results[["run", "combination", "baseline"]].merge(curves, on="run")
    arms = [arm for arm in ARMS[1:] if arm in set(table["combination"])]
    rows = []
    # a run without inhibition may have been evaluated more often
    evaluated = set(table.loc[table["combination"].isin(arms), "step"])
    for step, part in table[table["step"].isin(evaluated) & (table["step"] >= first)].groupby("step"):
        changes = [paired_differences(part, column)["relative"] for column in ("held_out_loss", "top_share_score")]
        rows.append([f"{step:,}", *(f"{changes[0][arm]:+.2%}, {changes[1][arm]:+.0%}" for arm in arms)])
    return markdown(["step", *(f"{arm}: loss, MS" for arm in arms)], rows)


def control_losses(curves: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return how much each control of CONTROLS loses against its baseline, in nats, by step. curves: by file."""
    losses = {name: one.set_index(["run", "step"])["held_out_loss"] for name, one in curves.items()}
    there = {control: losses[name][control] - losses[name][base] for control, (name, base) in CONTROLS.items()}
    return pd.DataFrame(there).drop(index=0).dropna(how="all")


def controls(losses: pd.DataFrame) -> str:
    """Return the losses of `control_losses`, with a row for each step."""
    rows = [[f"{step:,}", *("" if math.isnan(d) else f"{d:+.3f}" for d in row)] for step, row in losses.iterrows()]
    return markdown(["step", *losses.columns], rows)


def control_means(losses: pd.DataFrame) -> str:
    """Return the mean of the losses of `control_losses` at the ends of runs of each length."""
    ends = [(column.last_valid_index(), column.dropna().iloc[-1]) for _, column in losses.items()]
    rows = []
    for steps, loss in pd.DataFrame(ends, columns=["steps", "loss"]).groupby("steps")["loss"]:
        row = pd.Series({"pairs": len(loss), "difference": loss.mean(), "stderr": loss.sem()})
        rows.append([f"{steps:,}", str(len(loss)), interval(row, "{:+.3f}")])
    return markdown(["steps", "n", "loss of the control - that of none"], rows)


def changes(results: pd.DataFrame) -> str:
    """Return what inhibition changed in each combination that has a pair of runs, relative."""
    columns = {"held_out_loss": "{:+.2%}"} | dict.fromkeys(SCORES, "{:+.1%}")
    found = [paired_differences(results, column) for column in columns]
    rows = [
        [str(name), str(n), *(interval(one.loc[name], form) for one, form in zip(found, columns.values(), strict=True))]
        for name, n in found[0]["pairs"].items()
        if n
    ]
    return markdown(["run", "n", "held-out loss", *SCORES.values()], rows)


def by_size(transfer: pd.DataFrame, features: pd.DataFrame) -> str:
    """Return what each size has without inhibition, means over seeds."""
    of_sizes = transfer[transfer["method"] == "none"].merge(features, on="run").groupby("setting", sort=False)
    means = of_sizes[list(BY_SIZE)].mean()
    rows = [[str(size), str(n), *(f"{mean:.3f}" for mean in means.loc[size])] for size, n in of_sizes.size().items()]
    return markdown(["size", "n", *BY_SIZE.values()], rows)


def read(folder: Path, name: str) -> pd.DataFrame:
    """Return the lines of finished runs of NAME.csv, without the study in a run's name."""
    table = pd.read_csv(folder / f"{name}.csv")
    table["run"] = table["run"].str.split("/").str[-1]
    return table[table["state"] == "done"] if "state" in table else table


def read_curves(folder: Path, name: str) -> pd.DataFrame:
    """Return the lines of a file of curves.py, with the means over its layers."""
    curves = read(folder, name)
    return curves.assign(**{key: curves.filter(like=f"/{key}").mean(axis=1) for key in ("top_share_score", "mean_s")})


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    results, long, transfer = (read(folder, name) for name in ("results", "long", "transfer"))
    curves, long_curves, all_curves = (
        read_curves(folder, name) for name in ("curves", "long_curves", "all-layers_curves")
    )
    last = curves.groupby("run").tail(1).drop(columns=["held_out_loss"])
    losses = control_losses({"curves": curves, "long_curves": long_curves})
    tables = [
        main_table(results),
        by_step(results, curves, 900),  # the first evaluation after the projected loss begins
        by_measure(results, read(folder, "layers"), BY_LAYER, is_relative=True),
        controls(losses),
        control_means(losses),
        with_controls(all_curves, OF_ALL_LAYERS),
        by_step(read(folder, "all-layers"), all_curves, 300),
        with_controls(curves, SMALLER),
        main_table(long),
        by_step(long, long_curves, 1800),
        by_measure(long, read(folder, "long_layers"), BY_LAYER, is_relative=True),
        by_measure(long, read(folder, "long_measures"), WORTH),
        by_measure(results, read(folder, "features"), FEATURES),
        by_measure(results, read(folder, "measures").merge(last, on="run"), MEASURES),
        *(changes(read(folder, study)) for study in ("strength", "choices", "start")),
        changes(transfer),
        by_size(transfer, read(folder, "transfer_features")),
    ]
    print("\n".join(tables))


if __name__ == "__main__":
    main()
