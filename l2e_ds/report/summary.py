"""`l2e-ds summary RUN`: the first and last metrics of a run, as a short table. Reads the run directory only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2e_ds.config.sections import RunConfig
from l2e_ds.console import aligned
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.errors import DataError
from l2e_ds.report.runs import Run, comparable, read_run
from l2e_ds.report.statistics import steady_median
from l2e_ds.run_directory.configuration import read_config
from l2e_ds.run_directory.metrics import FILE, layer_key
from l2e_ds.training import guard


def summarise(directory: Path, baseline: Path | None = None) -> str:
    """Return a run's first and last metrics as aligned lines.

    baseline: a run without inhibition. Its metrics at the same step are shown, too, if all else is the same. Raises
    DataError for a path that is no run directory, for one without metrics, and for a broken file.
    """
    run = read_run(directory)
    if run is None or not run.training:
        raise DataError(f"{directory}: has no training metrics yet")
    target, last = run.config["inhibition.target_share"], run.training[-1]
    rows = [("steps", f"{last['step']:,} ({last['tokens']:,} tokens), method {run.method}")]
    plain: dict[str, Any] = {}  # the baseline's evaluation
    if run.evaluations:
        first, final = run.evaluations[0], run.evaluations[-1]
        if baseline is not None:
            plain, about = _baseline(baseline, run, final["step"])
        rows.append(
            (
                "held-out LM loss",
                f"{_loss(first['held_out_loss'])} (step {first['step']}) -> {_loss(final['held_out_loss'])}"
                f" (step {final['step']}){_beside(plain, 'held_out_loss', _loss)}",
            )
        )
        for name in run.sets:
            losses = " -> ".join(_loss(line.get(f"held_out_loss/{name}")) for line in (first, final))
            tokens = last.get(f"tokens/{name}")
            rows.append((f"  of {name}", losses if tokens is None else f"{losses} ({tokens:,} tokens)"))
        for name in run.texts:
            key = f"text_loss/{name}"
            since = next(line for line in run.evaluations if key in line)  # a resumed run may have added it
            losses = f"{_loss(since[key])} (step {since['step']}) -> {_loss(final[key])} (step {final['step']}"
            rows.append((f"text {name}", f"{losses}, {_loss(final[f'text_bits_per_byte/{name}'])} bits a byte)"))
    if last.get("observed_share") is not None:
        rows.append(("observed share", f"{last['observed_share']:.2%} (target {target:.2%})"))
    if run.evaluations:
        start = _before_inhibition(read_config(directory), run.evaluations)
        when = f" (step {start['step']}, before inhibition)" if start is not first else ""
        for layer in run.layers:
            for name, label in (("top_share_score", f"MS of the top {100 * target:g}%"), ("mean_s", "mean S")):
                key = layer_key(layer, name)
                since, at = start, when
                if key not in start:  # a resume has changed the share
                    since = next(line for line in run.evaluations if key in line)
                    at = f" (step {since['step']}; of another share before)"
                values = f"{_number(since[key])}{at} -> {_number(final.get(key))}"
                rows.append((f"layer {layer}: {label}", f"{values}{_beside(plain, key, _number)}"))
        if baseline is not None:
            rows.append(("without inhibition", about))
    harmed = guard.findings_of_run(run.starts, run.evaluations, run.findings)
    rows += [("warning", f"{seen} (docs/looking-inside.md)") for _, seen, _ in harmed]
    speed = steady_median(run, "tokens_per_second")
    rows.append(("tokens/s", "-" if speed is None else f"{speed:,.0f} (median)"))
    rows.append(("metrics", str(directory / FILE)))
    rows.append(("checkpoints", str(directory / "checkpoints")))
    return aligned(rows)


def _before_inhibition(config: RunConfig, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last evaluation before inhibition began, or the first one if it has not begun."""
    begins = config.inhibition.steps_of("start", config.training.steps) or 0
    before = [line for line in evaluations if line["step"] <= begins]
    is_inhibited = config.inhibition.method != "none" and evaluations[-1]["step"] > begins
    return before[-1] if is_inhibited and before else evaluations[0]


def _baseline(directory: Path, run: Run, step: int) -> tuple[dict[str, Any], str]:
    """Return the baseline's evaluation at a step and a description of it, or {} and why it is not compared.

    run: the one that it is compared with. Raises DataError.
    """
    plain = read_run(directory)
    if plain is None:
        raise DataError(f"{directory}: has no metrics yet")
    evaluation = next((line for line in plain.evaluations if line["step"] == step), None)
    own, base = (comparable(one, inhibition=False) for one in (run, plain))
    decisive = [key for key in own if key not in ("training.precision", "training.steps")]
    different = ", ".join([key for key in decisive if own[key] != base[key]][:3])
    if not different and schedule_of(read_config(run.directory)) != schedule_of(read_config(directory)):
        different = "training.steps, on which the learning rate depends"
    if plain.method != "none":
        return {}, f"{directory} is inhibited itself: not compared"
    if different:
        return {}, f"{directory} has another {different}: not compared"
    if evaluation is None or not plain.starts:
        return {}, f"{directory} has no evaluation at step {step}: not compared"
    start = plain.starts[-1]
    versions = start.get("versions", {})
    about = [str(start.get("time"))[:10], plain.config["training.precision"]]
    about += [f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions]
    sizes = ("train_tokens", "held_out_tokens")
    if run.starts and any(run.starts[-1].get(key) != start.get(key) for key in sizes):
        about.append("other text")
    share = plain.config["inhibition.target_share"]
    if share != run.config["inhibition.target_share"]:
        about.append(f"MS not compared: it is that of its top {100 * share:g}%")
        evaluation = {key: value for key, value in evaluation.items() if not key.endswith("/top_share_score")}
    return evaluation, f"{directory}, same seed ({', '.join(about)})"


def _beside(plain: dict[str, Any], key: str, text: Callable[[float | None], str]) -> str:
    return f"; {text(plain.get(key))} without inhibition" if key in plain else ""


def _loss(value: float | None) -> str:
    """Return a loss as text. Training writes null for one that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="a run without inhibition to compare with")


def run(arguments: argparse.Namespace) -> int:
    print(summarise(arguments.run, arguments.baseline))
    return 0
