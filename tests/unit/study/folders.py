"""Study folders as `l2e-ds study` leaves them, written directly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from l2e_ds.study.checking import resolve_runs, write_study
from l2e_ds.study.definition import Study, read_study
from l2e_ds.system.process import prepare_libraries
from l2e_ds.training.preflight import ResolvedRun

CORPUS = "The river froze early that year. Rain came in from the west before noon. " * 40
BASE = {
    "model": {"name": "pythia-14m", "vocab_size": 300, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
    "data": {"source": "text", "path": "corpus", "train_tokenizer": 300, "sequence_length": 16},
    "training": {"steps": 20, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
}
STUDY = {
    "title": "Two methods",
    "base": "base.yaml",
    "directory": "out",
    "seeds": [1, 2, 3],
    "factors": {"method": {"none": {"inhibition.method": "none"}, "l2e": {"inhibition.method": "l2e"}}},
    "baseline": {"method": "none"},
}


def study_file(folder: Path, **changes: object) -> Path:
    (folder / "corpus").mkdir(exist_ok=True)
    for name in ("one", "two"):
        (folder / f"corpus/{name}.txt").write_text(f"{name} {CORPUS}")
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def begun_study(folder: Path, **changes: object) -> tuple[Study, dict[str, ResolvedRun]]:
    """Write all that is written before a run starts, and return it; `folder` is the current one."""
    prepare_libraries()
    study = read_study(study_file(folder, **changes))
    runs = resolve_runs(study, 1, this_machine=False)
    write_study(study, runs)
    return study, runs


def begin_run(study: Study, runs: dict[str, ResolvedRun], name: str) -> Path:
    run = study.directory / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(runs[name].config.dump())
    return run


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step{step:08d}"
    folder.mkdir(parents=True)
    state = json.dumps({"train": {"step": step}})
    (folder / "state.json").write_text(state)
    entry = {"bytes": len(state), "sha256": hashlib.sha256(state.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": {"state.json": entry}}))


def evaluation(
    step: int,
    shots: int,
    tasks: dict[str, float],
    limit: int | None = None,
    asked: list[str] | None = None,
    precision: str = "fp32",
    **part_of: str,
) -> dict:
    figure = {"stderr": 0.01, "higher_is_better": True}
    return {
        "step": step,
        "precision": precision,
        "limit": limit,
        "asked": {"tasks": asked or list(tasks), "num_fewshot": shots},
        "tasks": {
            name: {
                "samples": 10,
                "cut": 0,
                "num_fewshot": shots,
                "part_of": part_of.get(name),
                "metrics": {"acc": {"value": value, **figure}},
            }
            for name, value in tasks.items()
        },
    }


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
