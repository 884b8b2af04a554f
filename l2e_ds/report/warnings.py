"""Find what looks wrong with runs. A reader must know it before looking at any curve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from l2e_ds.report.runs import Collection, Run, Variant, comparable, differing
from l2e_ds.report.statistics import loss_difference
from l2e_ds.report.tables import skipped_steps
from l2e_ds.run_directory.metrics import first_and_last, last_tenth, mean, number, numbers
from l2e_ds.training import guard

OFF_TARGET = 0.1  # distance from the target share, as a part of it
SKIPPED = 0.01  # share of the steps
DEAD = 0.01  # increase of the share of dead neurons of a layer


@dataclass(frozen=True)
class Notice:
    """A warning. kind: equal for warnings that are shown together; where: the page of the documentation."""

    kind: str
    text: str
    where: str


def all_warnings(page: Collection, now: datetime) -> list[Notice]:
    """Return all warnings, the most serious first."""
    found = [warning for run in page.runs for warning in _not_finite(run)]
    found += [warning for variant in page.variants for warning in _worse(page, variant)]
    for check in (_harmed, _off_target, _skipped, _dying):
        found += [warning for run in page.runs for warning in check(run)]
    found += [warning for variant in page.variants for warning in _repeated(variant)]
    found += _different(page)
    found += [warning for run in page.runs for warning in _unfinished(run, now)]
    if page.waiting:
        text = f"{len(page.waiting)} have written nothing yet: {', '.join(page.waiting)}"
        found.append(Notice("not finished", text, "docs/report.md"))
    return found


def _worse(page: Collection, variant: Variant) -> Iterator[Notice]:
    difference, base = loss_difference(page, variant), page.baseline_variant(variant)
    if difference is None or base is None:
        return
    paired, step = difference
    value, error, n = paired.difference.value, paired.difference.error, paired.difference.n
    if value > (error or 0.0):
        text = f"{variant.name}: held-out loss higher than that of {base.name} by {value:.4f}"
        text += ", one pair of runs" if error is None else f" ± {error:.4f}, standard error of n = {n} pairs of runs"
        yield Notice("loss worse than the paired baseline's", f"{text} (step {step:,})", "docs/results.md")


def _not_finite(run: Run) -> Iterator[Notice]:
    for name, lines, key in (("held-out", run.evaluations, "held_out_loss"), ("training", run.training, "lm_loss")):
        lost = [line["step"] for line in lines if number(line, key) is None]
        if lost:
            text = f"{run.name}: {name} loss, in {len(lost):,} of {len(lines):,} lines, first at step {lost[0]:,}"
            yield Notice("loss that is not finite", text, "docs/metrics.md")


def _harmed(run: Run) -> Iterator[Notice]:
    for name, seen, advice in guard.seen_in(run.starts, run.evaluations, run.findings):
        yield Notice(_HARM[name], f"{run.name}: {seen}{advice and f'; {advice}'}", "docs/looking-inside.md")


_HARM = {
    "shrank": "a layer that shrinks",
    "grew": "a layer that grows",
    "rose": "a layer that becomes more monosemantic for inhibition",
}


def _off_target(run: Run) -> Iterator[Notice]:
    target = run.config["inhibition.target_share"]
    lines = last_tenth(run.training)
    for layer in run.layers:
        key = f"layer{layer}/observed_share"
        share = mean(numbers(lines, key))
        if share is not None and abs(share / target - 1) > OFF_TARGET:
            text = f"{run.name}: layer {layer} had {share:.2%} selected, target {target:.2%}"
            text += f" (last tenth of {run.step:,} steps)"
            yield Notice("observed share off its target", text, "docs/method.md, 4")


def _skipped(run: Run) -> Iterator[Notice]:
    skipped = skipped_steps(run)
    if skipped > SKIPPED * run.step:
        text = f"{run.name}: {skipped:,} of {run.step:,} steps were skipped ({skipped / run.step:.1%})"
        yield Notice("skipped steps", text, "docs/metrics.md")


def _dying(run: Run) -> Iterator[Notice]:
    for layer in run.layers:
        first, last = first_and_last(run.evaluations, f"layer{layer}/dead_share")
        if first is not None and last is not None and last - first > DEAD:
            text = f"{run.name}: layer {layer} has {last:.1%} dead neurons, at first {first:.1%}"
            yield Notice("neurons that die", text, "docs/metrics.md")


def _repeated(variant: Variant) -> Iterator[Notice]:
    first = {run.seed: run for run in variant.seeds}
    for run in variant.runs:
        if run is not first[run.seed]:
            text = f"{run.name} has the seed and configuration of {first[run.seed].name}: counted once"
            yield Notice("run that is no further seed", text, "docs/report.md")


def _different(page: Collection) -> Iterator[Notice]:
    """Compare each run's configuration with its baseline's, and those of the runs outside studies that have none."""
    where = "docs/run-files.md"
    for run in page.runs:
        base = page.baseline_of(run)
        if base is not None:
            keys = differing([comparable(base, inhibition=False), comparable(run, inhibition=False)])
            if keys:
                values = "; ".join(f"{key} {base.config.get(key)} and {run.config.get(key)}" for key in keys)
                yield Notice("compared with another configuration", f"{base.name} and {run.name}: {values}", where)
    alone = [run for run in page.runs if not run.study]
    paired = [base for run in alone if (base := page.baseline_of(run)) is not None]
    if all(run in paired or page.baseline_of(run) is not None for run in alone):
        return
    keys = differing([comparable(run, inhibition=False, seed=False) for run in alone])
    seeds = {frozenset(run.seed for run in variant.runs) for variant in page.variants if not variant.runs[0].study}
    keys += ["training.seed"] if len(seeds) > 1 else []
    if keys:
        values = "; ".join(
            f"{key} {', '.join(dict.fromkeys(str(run.config.get(key)) for run in alone))}" for key in keys
        )
        yield Notice("runs that differ in more than inhibition", f"{len(alone)} runs: {values}", where)


def _unfinished(run: Run, now: datetime) -> Iterator[Notice]:
    if run.step < run.steps:
        ago = (now - run.written).total_seconds() / 60
        text = f"{run.name}: at step {run.step:,} of {run.steps:,}, last line written"
        text += f" {run.written:%Y-%m-%d %H:%M} UTC, {_age(ago)} before this page"
        yield Notice("not finished", text, "docs/report.md")


def _age(minutes: float) -> str:
    if minutes < 1:
        return "less than a minute"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"
