"""Run directories and studies as training writes them, with metrics that a test can compute by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2e_ds.analysis import tables
from l2e_ds.config.sections import RunConfig
from l2e_ds.report import published
from l2e_ds.run_directory.json_lines import append_line
from l2e_ds.run_directory.results import FILE
from tests.unit.analysis.single_tokens import EDGES, activations, kurtosis, slow_histogram, text_moments

STEPS, EVERY, EVALUATE = 100, 2, 10
LAYERS = (2, 3)


def write_run(
    directory: Path,
    method: str = "l2e",
    seed: int = 1234,
    size: str = "70m",
    until: int = STEPS,
    loss: float = 5.0,
    share: float = 0.02,
    shrink: float = 1.0,
    seconds: float = 0.5,
    skipped: int = 0,
    dead: float = 0.0,
    points: int | None = None,
    **keys: Any,
) -> Path:
    """Steps to `until` of STEPS.

    loss: held out at the last step of all, 3 more at first, on a line between; share: observed; shrink: mean S at the
    last step over the first; dead: share of dead neurons at the last step; points: lines of training.
    keys: `section__key=value` of the configuration.
    """
    directory.mkdir(parents=True)
    config: dict[str, dict] = {
        "model": {"name": f"pythia-{size}"},
        "data": {"source": "stdlib", "train_tokenizer": 4096, "sequence_length": 256},
        "training": {"steps": STEPS, "global_batch": 16, "seed": seed, "run_directory": str(directory)},
        "inhibition": {"method": method, "loss": "published", "coefficient": 1e-3},
    }
    for key, value in keys.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    run = RunConfig.model_validate(config)
    (directory / "config.yaml").write_text(run.dump())
    tokens_per_step = run.training.global_batch * run.data.sequence_length
    every = EVERY if points is None else until / points
    lines: list[dict] = [{"kind": "start", "step": 0, "ranks": 2, "device": "cpu", "parameters": 70_426_624,
                          "versions": {"l2e_ds": "0.1.0"}, "time": "2026-11-25T09:00:00Z", "host": "node1",
                          "git": {"commit": "0123456789abcdef", "changed": False}}]  # fmt: skip
    steps = [round(every * (index + 1)) for index in range(int(until / every))]
    for step in sorted({*steps, *range(0, until + 1, EVALUATE)}):
        done = step / STEPS
        if step in steps:
            line = {"kind": "train", "step": step, "applied_steps": step - round(skipped * done)}
            line |= {"tokens": step * tokens_per_step, "lm_loss": loss + 3 * (1 - done), "gradient_norm": 1 / step}
            line |= {"tokens_per_second": tokens_per_step / seconds, "step_seconds": seconds, "peak_memory_gib": 1.5}
            if run.logging.layer_gradients:
                line |= {f"gradient_norm/layer{layer}": (layer + 1) / step for layer in range(12)}
                line["gradient_norm/rest"] = 1.0
            if method != "none":
                line["observed_share"] = share
                for layer in LAYERS:
                    line |= {f"layer{layer}/observed_share": share, f"layer{layer}/selected_score": 9.0 + layer}
                    line |= {f"layer{layer}/tau": 5.0 - done, f"layer{layer}/mean_s": 0.3}
            lines.append(line)
        if step % EVALUATE == 0:
            line = {"kind": "evaluation", "step": step, "tokens": step * tokens_per_step}
            line["held_out_loss"] = loss + 3 * (1 - done)
            for part in run.data.sets or []:
                line[f"held_out_loss/{part.name}"] = line["held_out_loss"] + len(part.name)
            for text in run.evaluation.texts or []:
                line[f"text_loss/{text.name}"] = line["held_out_loss"] + 1
                line[f"text_bits_per_byte/{text.name}"] = line["held_out_loss"] / 4
            for layer in LAYERS:
                line |= {f"layer{layer}/top_share_score": 14.0 + layer, f"layer{layer}/kurtosis": 5.0 + layer}
                line[f"layer{layer}/mean_s"] = 0.3 * (1 + (shrink - 1) * done)
                line[f"layer{layer}/dead_share"] = dead * done
            lines.append(line)
    lines[1]["step_seconds"] = 50 * seconds  # compiling: a first line that counts for nothing
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def add_results(
    run: Path, step: int, figures: dict[tuple[str, int], tuple[float, float | None]], **others: Any
) -> None:
    """One line of evaluations.jsonl for each number of shots. figures: (task, shots) -> accuracy, standard error."""
    for shots in sorted({shots for _, shots in figures}):
        tasks = {
            task: {
                "samples": 1000,
                "cut": 0,
                "num_fewshot": shots,
                "version": 1.0,
                "part_of": "mmlu" if task.startswith("mmlu_") else None,
                "metrics": {
                    "acc_norm": {"value": accuracy + 0.1, "stderr": error, "higher_is_better": True},
                    "acc": {"value": accuracy, "stderr": error, "higher_is_better": True},
                },
            }
            for (task, of), (accuracy, error) in figures.items()
            if of == shots
        }
        append_line(run / FILE, {"step": step, "tokens": step * 4096, "limit": None, "tasks": tasks, **others})


def write_study(directory: Path, runs: list[dict[str, Any]], **others: Any) -> Path:
    """study.json of these runs: name, levels, seed, baseline. The runs themselves are written by the test."""
    directory.mkdir(parents=True, exist_ok=True)
    factors: dict[str, list[str]] = {}
    for run in runs:
        run.setdefault("directory", f"runs/{run['name']}")
        for factor, level in run["levels"].items():
            factors.setdefault(factor, []).append(level)
    index = {"title": "Main comparison", "name": "main", "factors": factors, "seeds": [1234],
             "baseline": {"method": "none"}, "evaluate": [], "runs": runs, **others}  # fmt: skip
    (directory / "study.json").write_text(json.dumps(index))
    return directory


def paired_study(directory: Path, sizes: tuple[str, ...] = ("70m",), seeds: tuple[int, ...] = (1234, 1235)) -> Path:
    """none and l2e of each size and seed; l2e gains 0.1 with the first seed, 0.2 with the second, takes 10 % longer
    and has the published share."""
    runs = []
    for size in sizes:
        for place, seed in enumerate(seeds):
            for method in ("none", "l2e"):
                name = f"{size}-{method}-seed{seed}"
                base = None if method == "none" else f"{size}-none-seed{seed}"
                levels = {"size": size, "method": method}
                runs.append({"name": name, "levels": levels, "seed": seed, "baseline": base})
                loss = 5.0 + 0.05 * place - (0.1 * (place + 1) if method == "l2e" else 0.0)
                seconds = 0.55 if method == "l2e" else 0.5
                best = published.BEST_SHARE[size]
                keys = {"share": best, "inhibition__target_share": best}
                write_run(directory / "runs" / name, method, seed, size, loss=loss, seconds=seconds, **keys)
    return write_study(directory, runs)


def write_analysis(
    folder: Path, source: str = "natural_language.jsonl", label: str = "pythia-70m", parameters: int = 70_426_624
) -> tables.Tables:
    """Write an analysis as `l2e-ds analyze` does, of random activations of one layer, and return its tables."""
    z, labels = activations(1, (12, 10, 14))
    mean, variance = (values.astype("float32") for values in text_moments(z))
    names = ("Danish", "French", "Greek")
    first = tables.first_tables(
        [(mean, variance)], labels, names, tokens=7, parameters=parameters, seed=0, resamples=20
    )
    counts = tables.LayerCounts(slow_histogram(z, labels, first.own[0].own), kurtosis(z))
    found = tables.build_tables(first, [counts], EDGES)
    place = folder / "models" / label
    place.mkdir(parents=True)
    for name, table in found.items():
        table.to_parquet(place / f"{name}.parquet", index=False)
    (folder / "figures").mkdir()
    drawing = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 900 400'><text x='9' y='90'>words</text></svg>"
    (folder / "figures/ks_over_scale.svg").write_text(drawing)
    models = [{"model": label, "label": label, "parameters": parameters, "texts": "digest"}]
    index = {"models": models, "texts": [{"digest": "digest", "source": source}]}
    (folder / "analysis.json").write_text(json.dumps(index))
    return found
