"""`l2e-ds summary RUN`: the first and last figures of a run, as a short table. Reads the run directory only."""

from __future__ import annotations

import statistics
from pathlib import Path

from l2e_ds.errors import DataError
from l2e_ds.report.run_directory import check_folder, read_config
from l2e_ds.training import guard
from l2e_ds.training.metrics_lines import FILE, after_first_intervals, layers_of, numbers, of_kind, read_lines


def summarise(run: Path) -> str:
    """Raises DataError: no run directory, no metrics yet, a broken file."""
    check_folder(run)
    try:
        lines = read_lines(run)
    except OSError as error:
        raise DataError(f"{run}: is no run directory ({error.strerror}: {error.filename})") from None
    training, evaluations = of_kind(lines, "train"), of_kind(lines, "evaluation")
    if not training:
        raise DataError(f"{run}: has no training metrics yet")
    inhibition = read_config(run).inhibition
    target = inhibition.target_share
    last = training[-1]
    speeds = numbers(after_first_intervals(lines), "tokens_per_second")  # as in the report
    rows = [("steps", f"{last['step']:,} ({last['tokens']:,} tokens), method {inhibition.method}")]
    if evaluations:
        first, final = evaluations[0], evaluations[-1]
        rows.append(
            (
                "held-out LM loss",
                f"{_loss(first['held_out_loss'])} (step {first['step']}) -> {_loss(final['held_out_loss'])}"
                f" (step {final['step']})",
            )
        )
        for name in (key.partition("/")[2] for key in final if key.startswith("held_out_loss/")):
            losses = " -> ".join(_loss(line.get(f"held_out_loss/{name}")) for line in (first, final))
            tokens = last.get(f"tokens/{name}")
            rows.append((f"  of {name}", losses if tokens is None else f"{losses} ({tokens:,} tokens)"))
    if last.get("observed_share") is not None:
        rows.append(("observed share", f"{last['observed_share']:.2%} (target {target:.2%})"))
    if evaluations:
        for layer in layers_of([final]):
            for name, label in (("top_share_score", f"MS of the top {target:.0%}"), ("mean_s", "mean S")):
                key = f"layer{layer}/{name}"
                rows.append((f"layer {layer}: {label}", f"{_number(first.get(key))} -> {_number(final.get(key))}"))
    starts, findings = of_kind(lines, "start"), of_kind(lines, "guard")
    rows += [("warning", f"{seen} (docs/faq.md)") for _, seen, _ in guard.seen_in(starts, evaluations, findings)]
    rows.append(("tokens/s", f"{statistics.median(speeds):,.0f} (median)" if speeds else "-"))
    rows.append(("metrics", str(run / FILE)))
    rows.append(("checkpoints", str(run / "checkpoints")))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def _loss(value: float | None) -> str:
    """None: training writes null for what is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
