"""Find what looks wrong with runs. A reader must know it before looking at any curve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from l2e_ds.report.runs import Collection, Run, Variant, comparable, differing
from l2e_ds.report.statistics import loss_difference
from l2e_ds.run_directory.metrics import first_and_last, mean_of_last_tenth, number
from l2e_ds.training import guard

OFF_TARGET = 0.1  # distance from the target share, as a part of it
SKIPPED = 0.01  # share of the steps
DEAD = 0.01  # increase of the share of dead neurons of a layer

_WHERE = {
    "loss that is not finite": "docs/metrics.md",
    "loss worse than the paired baseline's": "docs/results.md",
    "a layer that shrinks": "docs/looking-inside.md",
    "a layer that grows": "docs/looking-inside.md",
    "a layer that becomes more monosemantic for inhibition": "docs/looking-inside.md",
    "observed share off its target": "docs/method.md, 4",
    "skipped steps": "docs/metrics.md",
    "neurons that die": "docs/metrics.md",
    "run that is no further seed": "docs/report.md",
    "scores that do not compare": "docs/studies.md",
    "compared with another configuration": "docs/run-files.md",
    "runs that differ in more than inhibition": "docs/run-files.md",
    "not finished": "docs/report.md",
}
"""The kinds of warnings, the most serious first, and the page of the documentation about each."""
_HARM = {
    "shrank": "a layer that shrinks",
    "grew": "a layer that grows",
    "rose": "a layer that becomes more monosemantic for inhibition",
}


@dataclass(frozen=True)
class Notice:
    """A warning."""

    kind: str
    text: str

    @property
    def where(self) -> str:
        return _WHERE[self.kind]


def all_warnings(collection: Collection) -> list[Notice]:
    """Return all warnings, the most serious first."""
    found = [notice for variant in collection.variants for notice in _of_variant(collection, variant)]
    found += [notice for run in collection.runs for notice in _of_run(run)]
    found += [*_different(collection), *_measured_on_others(collection)]
    if collection.waiting:
        text = f"{len(collection.waiting)} have written nothing yet: {', '.join(collection.waiting)}"
        found.append(Notice("not finished", text))
    return sorted(found, key=lambda notice: list(_WHERE).index(notice.kind))


def _of_variant(collection: Collection, variant: Variant) -> Iterator[Notice]:
    first = {run.seed: run.name for run in variant.seeds}
    for run in variant.runs:
        if run.name != first[run.seed]:
            text = f"{run.name} has the seed and configuration of {first[run.seed]}: counted once"
            yield Notice("run that is no further seed", text)
    found, base = loss_difference(collection, variant), collection.baseline_variant(variant)
    if found is None or base is None:
        return
    difference, step = found[0].difference, found[1]
    if difference.value > (difference.error or 0.0):
        text = f"{variant.name}: held-out loss higher than that of {base.name} by {difference.value:.4f}"
        if difference.error is None:
            text += ", one pair of runs"
        else:
            text += f" ± {difference.error:.4f}, standard error of n = {difference.n} pairs of runs"
        yield Notice("loss worse than the paired baseline's", f"{text} (step {step:,})")


def _of_run(run: Run) -> Iterator[Notice]:
    for name, lines, key in (("held-out", run.evaluations, "held_out_loss"), ("training", run.training, "lm_loss")):
        lost = [line["step"] for line in lines if number(line, key) is None]
        if lost:
            text = f"{run.name}: {name} loss, in {len(lost):,} of {len(lines):,} lines, first at step {lost[0]:,}"
            yield Notice("loss that is not finite", text)
    for name, seen, advice in guard.findings_of_run(run.starts, run.evaluations, run.findings):
        yield Notice(_HARM[name], f"{run.name}: {seen}{advice and f'; {advice}'}")
    target = run.config["inhibition.target_share"]
    for layer in run.layers:
        share = mean_of_last_tenth(run.training, f"layer{layer}/observed_share")
        if share is not None and abs(share / target - 1) > OFF_TARGET:
            text = f"{run.name}: layer {layer} had {share:.2%} selected, target {target:.2%}"
            yield Notice("observed share off its target", f"{text} (last tenth of {run.step:,} steps)")
        first, last = first_and_last(run.evaluations, f"layer{layer}/dead_share")
        if first is not None and last is not None and last - first > DEAD:
            text = f"{run.name}: layer {layer} has {last:.1%} dead neurons, at first {first:.1%}"
            yield Notice("neurons that die", text)
    if run.skipped_steps > SKIPPED * run.step:
        share = run.skipped_steps / run.step
        text = f"{run.name}: {run.skipped_steps:,} of {run.step:,} steps were skipped ({share:.1%})"
        yield Notice("skipped steps", text)
    if run.step < run.steps:
        written = f"last line written {run.written:%Y-%m-%d %H:%M} UTC"
        yield Notice("not finished", f"{run.name}: at step {run.step:,} of {run.steps:,}, {written}")


def _measured_on_others(collection: Collection) -> Iterator[Notice]:
    """Compare the layers and target shares on which MS, mean S and kurtosis of the runs of a model are measured."""
    for size in dict.fromkeys(run.size for run in collection.runs):
        runs = [run for run in collection.runs if run.size == size and run.evaluations]
        layers = dict.fromkeys(" ".join(map(str, run.layers)) for run in runs)
        shares = dict.fromkeys(run.config["inhibition.target_share"] for run in runs)
        if len(layers) > 1:
            text = f"{size}: MS, mean S and kurtosis are of the layers {'; '.join(layers)}"
            yield Notice("scores that do not compare", text)
        if len(shares) > 1:
            given = ", ".join(f"{100 * share:g}%" for share in shares)
            yield Notice("scores that do not compare", f"{size}: MS of the top share is of the target shares {given}")


def _different(collection: Collection) -> Iterator[Notice]:
    """Compare each run's configuration with its baseline's, and those of the runs outside studies that have none."""
    base_of = {run.name: collection.baseline_of(run) for run in collection.runs}
    for run in collection.runs:
        base = base_of[run.name]
        if base is None:
            continue
        keys = differing([comparable(base, inhibition=False), comparable(run, inhibition=False)])
        if keys:
            values = "; ".join(f"{key} {base.config.get(key)} and {run.config.get(key)}" for key in keys)
            yield Notice("compared with another configuration", f"{base.name} and {run.name}: {values}")
    alone = [run for run in collection.runs if not run.study]
    bases = [base_of[run.name] for run in alone]
    if all(run in bases or base_of[run.name] is not None for run in alone):
        return
    keys = differing([comparable(run, inhibition=False, seed=False) for run in alone])
    seeds = {
        frozenset(run.seed for run in variant.runs) for variant in collection.variants if not variant.runs[0].study
    }
    keys += ["training.seed"] if len(seeds) > 1 else []
    if keys:
        values = "; ".join(
            f"{key} {', '.join(dict.fromkeys(str(run.config.get(key)) for run in alone))}" for key in keys
        )
        yield Notice("runs that differ in more than inhibition", f"{len(alone)} runs: {values}")
