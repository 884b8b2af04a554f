"""`l2e-ds study` with real runs: stopped, killed, resumed, evaluated, collected; a run that fails alone."""

from __future__ import annotations

import json
import signal
import sys

import pandas as pd
import yaml

from tests.integration.running import lines, newest, saved

NON_FINITE = {"inhibition.method": "l2e", "optimizer.peak_learning_rate": 1e30, "training.max_skipped_steps": 2}
STEPS = 30
"""Of 32 micro-batches each: a run takes several seconds on any machine, and is interrupted where it is meant to be."""


def tiny_task(folder) -> None:
    folder.mkdir()
    documents = [{"question": f"{i} and one make", "choices": [f"{i + 1}", f"{i + 7}"], "answer": 0} for i in range(8)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "tiny_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tiny.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(task))


def test_stopped_and_killed_it_is_still_the_same_study(launch, run_file, tmp_path):
    tiny_task(tmp_path / "tasks")
    base = yaml.safe_load(run_file.read_text())
    del base["data"]["cache"]
    base["training"] |= {"steps": STEPS, "evaluate_every": STEPS, "timeout": 1, "global_batch": 64, "micro_batch": 2}
    base["logging"] |= {"progress": False}
    run_file.write_text(yaml.safe_dump(base))
    methods = {"none": {"inhibition.method": "none"}, "broken": NON_FINITE}
    study = tmp_path / "study"
    content = {
        "title": "A run and one that cannot go on",
        "base": "run.yaml",
        "directory": str(study),
        "seeds": [7],
        "factors": {"method": methods},
        "baseline": {"method": "none"},
    }
    path = tmp_path / "methods.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "l2e_ds.cli", "study"]
    plain, broken = (study / "runs" / f"{name}-seed7" for name in methods)

    # one run on two ranks, asked to stop as by Ctrl-C
    one = launch(*command, path, "--ranks", "2")
    one.wait_for(lambda: newest(plain) >= 3)
    one.process.send_signal(signal.SIGINT)
    assert one.end() == 75, one.said()
    first = saved(plain)
    assert first == newest(plain) < STEPS and lines(plain, "start")[0]["ranks"] == 2
    assert "asked to stop" in one.said() and f"at step {first}" not in one.said()
    table = pd.read_csv(study / "results.csv").set_index("run")
    assert table["state"].tolist() == [f"at step {first}", "not begun"]

    # on one rank; the study itself is killed: what it runs saves and stops
    one = launch(*command, path, "--devices", "1")
    one.wait_for(lambda: newest(plain) >= first + 3)
    one.process.kill()
    one.process.wait()
    # two at a time, at once, from the folder alone: waits for what is left, then goes on
    one = launch(*command, study / "study.yaml", "--devices", "2")
    assert one.end() == 1, one.said()
    assert f"none-seed7: begins (at step {saved_before(plain)})" in one.said()
    failures = [line for line in one.said().splitlines() if "failed: " in line]
    assert len(failures) == 2 and failures[0] == failures[1], failures  # when it happened, and at the end
    assert (
        failures[0].startswith("l2e-ds study: broken-seed7: failed: ")
        and "2 steps in a row changed no weight" in failures[0]
        and "had non-finite gradients" in failures[0]
    )

    assert [line["step"] for line in lines(plain)] == list(range(1, STEPS + 1))
    assert len(lines(plain, "start")) == 3
    table = pd.read_csv(study / "results.csv").set_index("run")
    assert table["state"].tolist() == ["done", "begun"]

    # then evaluated, on two ranks, without the broken one
    evaluate = [{"tasks": ["tiny_sums"], "num_fewshot": 0, "include_path": ["tasks"]}]
    content |= {"exclude": [{"method": "broken"}], "evaluate": evaluate}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    one = launch(*command, path, "--ranks", "2")
    assert one.end() == 0, one.said()
    assert (broken / "config.yaml").is_file()
    assert "none-seed7: begins (not evaluated)" in one.said() and len(lines(plain, "start")) == 3
    (evaluation,) = [json.loads(line) for line in (plain / "evaluations.jsonl").read_text().splitlines()]
    assert (evaluation["step"], evaluation["ranks"], evaluation["precision"]) == (STEPS, 2, "fp32")
    assert evaluation["tasks"]["tiny_sums"]["samples"] == 8
    # one set of tokens for all
    (tokens,) = (study / "data").iterdir()
    assert not (plain / "data").exists() and tokens.name.startswith("text-")

    (row,) = pd.read_csv(study / "results.csv").to_dict("records")
    assert (row["run"], row["state"], row["evaluated_step"]) == ("none-seed7", "done", STEPS)
    assert row["held_out_loss"] == lines(plain, "evaluation")[-1]["held_out_loss"]
    assert row["tiny_sums/0-shot/acc"] == evaluation["tasks"]["tiny_sums"]["metrics"]["acc"]["value"]


def saved_before(run) -> int:
    """Return the step from which the last start resumed."""
    return lines(run, "start")[-1]["step"]
