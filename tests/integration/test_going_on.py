"""Starts in a used run directory: finished, with other values, moved, from another working directory."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml

from tests.integration.running import lines
from tests.processes import REPOSITORY

STARTS = """
import json, os, shutil, sys
from l2e_ds.train import main
for folder, words in json.loads(sys.argv[1]):
    os.chdir(folder)
    print("start:", *words, file=sys.stderr, flush=True)
    code = main(words) if words[0] != "copy" else shutil.copytree(*words[1:]) and 0
    print("code:", code, file=sys.stderr, flush=True)
"""


def content(run: Path) -> dict[Path, tuple[bytes, int]]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {path.relative_to(run): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def starts(launch, *each: tuple[Path, list[str]]) -> list[tuple[int, str]]:
    """Return exit code and lines of starts one after another in one process, of which only one may train (DeepSpeed);
    also `copy RUN ELSEWHERE`, which keeps the files' times."""
    words = json.dumps([(str(folder), [str(word) for word in command]) for folder, command in each])
    one = launch(sys.executable, "-c", STARTS, words)
    assert one.end() == 0, one.said()[-3000:]
    found = []
    for part in one.said().split("start: ")[1:]:
        said, _, code = part.partition("\n")[2].partition("code: ")
        found.append((int(code.split()[0]), said))
    return found


def test_a_run_stays_what_it_is_wherever_it_lies(launch, run_file, tmp_path):
    """One run of 6 steps, from a relative path to its text; then starts that train nothing leave every file alone."""
    raw = yaml.safe_load(run_file.read_text())
    del raw["data"]["cache"], raw["optimizer"]["schedule_steps"], raw["training"]["run_directory"]
    raw["data"]["path"] = "corpus"
    raw["logging"]["progress"] = False
    run_file.write_text(yaml.safe_dump(raw))
    run, then = tmp_path / "runs/run", tmp_path / "then"

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "corpus", other / "corpus")
    shutil.copy(run_file, other / "run.yaml")
    there = f"training.run_directory={run}"
    first, copied, *found = starts(
        launch,
        (tmp_path, [run_file]),
        (tmp_path, ["copy", run, then]),
        (tmp_path, [run_file]),
        (tmp_path, [run_file, "checkpoint.every=2", "training.micro_batch=4"]),
        (tmp_path, [run_file, "inhibition.coefficient=0.5", "optimizer.peak_learning_rate=0.01"]),
        (tmp_path, [run_file, "training.steps=12"]),
        (other, ["run.yaml", there]),  # of the same name, over another text
    )
    assert (first[0], copied[0]) == (0, 0)
    assert [code for code, _ in found] == [0, 0, 2, 2, 2]
    assert content(run) == content(then)
    said = [text for _, text in found]
    for text in said[:2]:
        assert text == "nothing to do: runs/run/checkpoints/step00000006 is there, training.steps is 6\n"
    assert "optimizer.peak_learning_rate: 0.003 -> 0.01, inhibition.coefficient: 0.01 -> 0.5;" in said[2]
    assert "training.steps: 6 -> 12 (learning rate of the next step: " in said[3]
    assert f"data.path: {tmp_path}/corpus -> {other}/corpus;" in said[4]
    assert all(text.startswith("l2e-ds: error: ") and text.count("\n") == 1 for text in said[2:5])

    # moved, and gone on with from another working directory, with what the user allows; a copy goes its own way
    moved = tmp_path / "elsewhere/moved"
    moved.parent.mkdir()
    shutil.move(run, moved)
    shutil.copytree(moved, tmp_path / "copy")
    allowed = ["training.steps=8", "training.allow_changes=[training.steps,inhibition.coefficient]"]
    words = ["config.yaml", *allowed, "inhibition.coefficient=0.5"]
    finished, (code, text) = starts(launch, (REPOSITORY, [moved / "config.yaml"]), (tmp_path / "copy", words))
    assert finished == (0, f"nothing to do: {moved}/checkpoints/step00000006 is there, training.steps is 6\n")
    assert code == 0, text
    assert f"resumed from {tmp_path}/copy/checkpoints/step00000006" in text
    assert "changed since that checkpoint: inhibition.coefficient: 0.01 -> 0.5" in text
    assert [line["step"] for line in lines(tmp_path / "copy")] == list(range(1, 9))
    changes = lines(tmp_path / "copy", "start")[-1]["changes"]
    assert "training.steps: 6 -> 8" in changes and "inhibition.coefficient: 0.01 -> 0.5" in changes
    assert content(moved) == content(then) and not run.exists() and not (REPOSITORY / "runs/run").exists()
