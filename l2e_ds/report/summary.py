"""`l2e-ds summary RUN`: the first and last metrics of a run, as a short table. Reads the run directory only."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2e_ds.config.sections import DECIDES_NO_RESULT, RunConfig, flat
from l2e_ds.console import aligned
from l2e_ds.errors import DataError
from l2e_ds.run_directory.configuration import check_folder, read_config
from l2e_ds.run_directory.metrics import FILE, after_first_intervals, layers_of, numbers, of_kind, read_lines, texts_of
from l2e_ds.training import guard


def summarise(run: Path, baseline: Path | None = None) -> str:
    """Return a run's first and last metrics as aligned lines.

    baseline: a run without inhibition. Its metrics at the same step are shown, too, if all else is the same. Raises
    DataError for a path that is no run directory, for one without metrics, and for a broken file.
    """
    lines = _lines(run)
    training, evaluations = of_kind(lines, "train"), of_kind(lines, "evaluation")
    if not training:
        raise DataError(f"{run}: has no training metrics yet")
    config = read_config(run)
    inhibition = config.inhibition
    target = inhibition.target_share
    last = training[-1]
    speeds = numbers(after_first_intervals(lines), "tokens_per_second")  # the same lines as for the report
    rows = [("steps", f"{last['step']:,} ({last['tokens']:,} tokens), method {inhibition.method}")]
    plain: dict[str, Any] = {}  # the baseline's evaluation
    if evaluations:
        first, final = evaluations[0], evaluations[-1]
        if baseline is not None:
            plain, about = _baseline(baseline, config, lines, final["step"])
        rows.append(
            (
                "held-out LM loss",
                f"{_loss(first['held_out_loss'])} (step {first['step']}) -> {_loss(final['held_out_loss'])}"
                f" (step {final['step']}){_beside(plain, 'held_out_loss', _loss)}",
            )
        )
        for name in (key.partition("/")[2] for key in final if key.startswith("held_out_loss/")):
            losses = " -> ".join(_loss(line.get(f"held_out_loss/{name}")) for line in (first, final))
            tokens = last.get(f"tokens/{name}")
            rows.append((f"  of {name}", losses if tokens is None else f"{losses} ({tokens:,} tokens)"))
        for name in texts_of(final):
            key = f"text_loss/{name}"
            since = next(line for line in evaluations if key in line)  # a resumed run may have added it
            losses = f"{_loss(since[key])} (step {since['step']}) -> {_loss(final[key])} (step {final['step']}"
            rows.append((f"text {name}", f"{losses}, {_loss(final[f'text_bits_per_byte/{name}'])} bits a byte)"))
    if last.get("observed_share") is not None:
        rows.append(("observed share", f"{last['observed_share']:.2%} (target {target:.2%})"))
    if evaluations:
        start = _before_inhibition(config, evaluations)
        when = f" (step {start['step']}, before inhibition)" if start is not first else ""
        for layer in layers_of([final]):
            for name, label in (("top_share_score", f"MS of the top {target:.0%}"), ("mean_s", "mean S")):
                key = f"layer{layer}/{name}"
                then, now = _number(start.get(key)), _number(final.get(key))
                rows.append((f"layer {layer}: {label}", f"{then}{when} -> {now}{_beside(plain, key, _number)}"))
        if baseline is not None:
            rows.append(("without inhibition", about))
    starts, findings = of_kind(lines, "start"), of_kind(lines, "guard")
    rows += [
        ("warning", f"{seen} (docs/looking-inside.md)") for _, seen, _ in guard.seen_in(starts, evaluations, findings)
    ]
    rows.append(("tokens/s", f"{statistics.median(speeds):,.0f} (median)" if speeds else "-"))
    rows.append(("metrics", str(run / FILE)))
    rows.append(("checkpoints", str(run / "checkpoints")))
    return aligned(rows)


def _lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics. Raises DataError."""
    check_folder(run)
    try:
        return read_lines(run)
    except OSError as error:
        raise DataError(f"{run}: is no run directory ({error.strerror}: {error.filename})") from None


def _before_inhibition(config: RunConfig, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last evaluation before inhibition began, or the first one if it has not begun."""
    begins = config.inhibition.in_steps("start", config.training.steps) or 0
    before = [line for line in evaluations if line["step"] <= begins]
    is_inhibited = config.inhibition.method != "none" and evaluations[-1]["step"] > begins
    return before[-1] if is_inhibited and before else evaluations[0]


def _baseline(directory: Path, config: RunConfig, lines: list[dict[str, Any]], step: int) -> tuple[dict[str, Any], str]:
    """Return the baseline's evaluation at a step and a description of the baseline, or {} and why it is not compared.

    config, lines: those of the run that it is compared with. Raises DataError.
    """
    base_lines, base_config = _lines(directory), read_config(directory)
    evaluation = next((line for line in of_kind(base_lines, "evaluation") if line["step"] == step), None)
    own, base = _decisive(config), _decisive(base_config)
    different = ", ".join([key for key in own if own[key] != base[key]][:3])
    if base_config.inhibition.method != "none":
        return {}, f"{directory} is inhibited itself: not compared"
    if different:
        return {}, f"{directory} has another {different}: not compared"
    base_starts, own_starts = of_kind(base_lines, "start"), of_kind(lines, "start")
    if evaluation is None or not base_starts:
        return {}, f"{directory} has no evaluation at step {step}: not compared"
    start = base_starts[-1]
    versions = start.get("versions", {})
    about = [str(start.get("time"))[:10], base_config.training.precision]
    about += [f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions]
    sizes = ("train_tokens", "held_out_tokens")
    if own_starts and any(own_starts[-1].get(key) != start.get(key) for key in sizes):
        about.append("other text")
    return evaluation, f"{directory}, same seed ({', '.join(about)})"


def _decisive(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the results, but for inhibition, precision and the number of steps."""
    left_out = (*DECIDES_NO_RESULT, "inhibition.", "training.precision", "training.steps")
    return {key: value for key, value in flat(config).items() if not key.startswith(left_out)}


def _beside(plain: dict[str, Any], key: str, text: Callable[[float | None], str]) -> str:
    return f"; {text(plain.get(key))} without inhibition" if plain else ""


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
