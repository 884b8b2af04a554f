"""The table of a study and its statistics, against numbers computed by hand."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from l2e_ds.errors import ConfigError, DataError
from l2e_ds.study import array_task
from l2e_ds.study.collect import collect, figures_of, finished, paired_differences, summary, write_results
from tests.unit.study.folders import begin_run, begun_study, checkpoint, evaluation, write_lines


def metrics(loss: float, seconds: float, extra: float = 0.0) -> list[dict]:
    def train(step: int, step_seconds: float) -> dict:
        speeds = {
            "tokens_per_second": 128 / step_seconds,
            "step_seconds": step_seconds,
            "peak_memory_gib": 1 + step / 100,
        }
        known = {"kind": "train", "step": step, "tokens": step * 128, "lm_loss": loss}
        return {**known, "observed_share": 0.02 + step / 1e4, **speeds}

    def held_out(step: int, value: float) -> dict:
        layers = {"layer1/mean_s": 0.1, "layer2/mean_s": 0.3, "layer1/kurtosis": None, "layer2/kurtosis": 5.0}
        scores = {"layer1/top_share_score": 10.0 + extra, "layer2/top_share_score": 12.0 + extra}
        texts = {"text_loss/own": value + 1, "text_bits_per_byte/own": value / 4}
        known = {"kind": "evaluation", "step": step, "tokens": step * 128, "held_out_loss": value}
        return {**known, **texts, **layers, **scores}

    return [
        {"kind": "start", "step": 0},
        held_out(0, 9.0),
        train(5, 100.0),  # the first interval of each start does not count
        train(10, seconds),
        {"kind": "start", "step": 10},
        train(15, 50.0),
        train(18, seconds + 0.2),
        train(20, seconds + 0.1),
        held_out(20, loss),
    ]


LOSSES = {1: (5.0, 4.9), 2: (5.5, 5.2), 3: (6.0, 5.8)}


@pytest.fixture
def table(tmp_path, monkeypatch) -> pd.DataFrame:
    monkeypatch.chdir(tmp_path)
    evaluate = [{"tasks": ["arc_easy"], "num_fewshot": 0}]
    study, runs = begun_study(tmp_path, evaluate=evaluate)
    for seed, losses in LOSSES.items():
        for method, loss in zip(("none", "l2e"), losses, strict=True):
            run = begin_run(study, runs, f"{method}-seed{seed}")
            write_lines(run / "metrics.jsonl", metrics(loss, 1.0 if method == "none" else 1.1, seed))
            checkpoint(run, 20)
            old, parts = evaluation(10, 0, {"arc_easy": 0.9}), {"mmlu": 0.25, "mmlu_law": 0.5}
            new = evaluation(20, 0, {"arc_easy": loss / 10, **parts}, mmlu_law="mmlu")
            write_lines(run / "evaluations.jsonl", [old, new])
    with (study.directory / "runs/none-seed1/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # it is being written
    return collect(study.directory)


def test_one_line_a_run(table, tmp_path):
    assert list(table["run"]) == [f"{method}-seed{seed}" for seed in (1, 2, 3) for method in ("none", "l2e")]
    row = table.set_index("run").loc["l2e-seed2"]
    assert (row["combination"], row["method"], row["seed"], row["baseline"]) == ("l2e", "l2e", 2, "none-seed2")
    assert (row["state"], row["step"], row["tokens"], row["held_out_loss"]) == ("done", 20, 2560, 5.2)
    assert row["evaluated_step"] == 20
    assert row["top_share_score"] == 13.0 and row["mean_s"] == pytest.approx(0.2)
    assert row["kurtosis"] is None or math.isnan(row["kurtosis"])  # one of the two layers has none
    assert (row["measured_layers"], row["measured_share"]) == ("1 2", 0.02)
    assert row["observed_share"] == pytest.approx(0.022) and row["peak_memory_gib"] == pytest.approx(1.2)
    assert row["step_seconds"] == pytest.approx(1.2)  # the median of 1.1, 1.3 and 1.2
    assert row["tokens_per_second"] == pytest.approx(128 / 1.2)
    assert row["arc_easy/0-shot/acc"] == pytest.approx(0.52) and row["arc_easy/0-shot/acc_stderr"] == 0.01
    assert row["text_loss/own"] == 6.2 and row["text_bits_per_byte/own"] == 1.3
    assert figures_of(table)[:2] == ["text_loss/own", "text_bits_per_byte/own"]
    assert figures_of(table)[2:] == ["arc_easy/0-shot/acc", "mmlu/0-shot/acc"]  # the parts of mmlu are in mmlu
    write_results(tmp_path / "out", table)
    again = pd.read_csv(tmp_path / "out/results.csv")
    assert list(again.columns) == list(table.columns) and again["held_out_loss"].equals(table["held_out_loss"])
    assert again["method"].tolist() == ["none", "l2e"] * 3 and again["baseline"].isna().tolist() == [True, False] * 3


def test_paired_differences(table):
    found = paired_differences(table, "held_out_loss")
    assert list(found.index) == ["none", "l2e"]
    plain, l2e = found.loc["none"], found.loc["l2e"]
    assert (plain["runs"], plain["mean"], plain["pairs"]) == (3, 5.5, 0)
    assert math.isnan(plain["difference"]) and math.isnan(plain["stderr"])
    assert (l2e["runs"], l2e["pairs"]) == (3, 3) and l2e["mean"] == pytest.approx(5.3)
    assert l2e["difference"] == pytest.approx(-0.2)  # of -0.1, -0.3, -0.2
    assert l2e["stderr"] == pytest.approx(0.1 / math.sqrt(3))
    relative = [-0.1 / 5.0, -0.3 / 5.5, -0.2 / 6.0]
    assert l2e["relative"] == pytest.approx(sum(relative) / 3)

    # a run without its figure takes its pair with it; of one pair there is no standard error
    less = table.assign(held_out_loss=table["held_out_loss"].where(~table["run"].isin(["none-seed1", "l2e-seed2"])))
    one = paired_differences(less, "held_out_loss").loc["l2e"]
    assert (one["runs"], one["pairs"]) == (2, 1) and one["difference"] == pytest.approx(-0.2)
    assert math.isnan(one["stderr"])


def test_scores_are_compared_where_they_are_of_the_same(table):
    """MS of the same target share and layers, mean S of the same layers, a loss always."""
    for column, alike in {"measured_share": ("mean_s", "held_out_loss"), "measured_layers": ("held_out_loss",)}.items():
        other = table.assign(**{column: table[column].where(table["run"] != "l2e-seed2", "other")})
        for name in ("held_out_loss", "top_share_score", "mean_s"):
            found = paired_differences(other, name).loc["l2e"]
            assert (found["runs"], found["pairs"]) == (3, 3 if name in alike else 2)


def test_a_run_that_has_not_ended_is_not_compared(table):
    """One that stands at the step of its newest evaluation, and one without a finite loss at its end."""
    begun = table.assign(state=table["state"].where(table["run"] != "l2e-seed1", "at step 20"))
    for name in ("held_out_loss", "arc_easy/0-shot/acc"):
        found = paired_differences(finished(begun), name).loc["l2e"]
        assert (found["runs"], found["pairs"]) == (2, 2)
    assert "| l2e | 2 | 5.5000 | -0.2500 ± 0.0500 (n = 2) |" in summary(begun)  # of 5.2, 5.8
    lost = table.assign(held_out_loss=table["held_out_loss"].where(table["run"] != "l2e-seed1"))
    assert "| l2e | 3 | 5.5000 (n = 2) | -0.2500 ± 0.0500 (n = 2) |" in summary(lost)


def test_the_printed_table(table):
    text = summary(table)
    assert "| l2e | 3 | 5.3000 | -0.2000 ± 0.0577 (n = 3) |" in text
    assert "| 1.2000 | +9.1 ± 0.0 % (n = 3) |" in text
    assert "| arc_easy/0-shot/acc | l2e | 3 | 0.5300 | -0.0200 ± 0.0058 (n = 3) |" in text
    assert "| text_loss/own | l2e | 3 | 6.3000 | -0.2000 ± 0.0577 (n = 3) |" in text
    single = summary(table[table["seed"] == 1])
    assert "| l2e | 1 | 4.9000 | -0.1000 |" in single and "nan" not in single


def test_only_what_is_equally_long_is_compared(table):
    """Runs are compared as if a study's `training.steps` had grown, and evaluation had been turned off."""
    longer = table.assign(step=table["step"].where(table["run"] != "l2e-seed1", 30))
    longer["evaluated_step"] = longer["step"]
    text = summary(longer)
    assert "| l2e | 3 | 5.3000 | -0.2500 ± 0.0500 (n = 2) |" in text  # of -0.3, -0.2
    assert "| arc_easy/0-shot/acc | l2e | 3 | 0.5300 | -0.0250 ± 0.0050 (n = 2) |" in text
    stale = table.assign(evaluated_step=table["evaluated_step"].where(table["run"] != "none-seed2", 10))
    text = summary(stale)
    assert "| none | 3 | 5.5000 (n = 2) |  |" in text  # of 5.0, 6.0
    assert "| l2e | 3 | 5.3000 | -0.1500 ± 0.0500 (n = 2) |" in text  # of -0.1, -0.2
    assert "| text_loss/own | l2e | 3 | 6.3000 | -0.1500 ± 0.0500 (n = 2) |" in text
    assert "| arc_easy/0-shot/acc | l2e | 3 | 0.5300 | -0.0200 ± 0.0058 (n = 3) |" in text


def test_figures_of_the_documents_that_the_study_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate = [{"tasks": ["piqa"], "num_fewshot": 0}, {"tasks": ["sciq"], "num_fewshot": 0, "limit": 10}]
    study, runs = begun_study(tmp_path, evaluate=evaluate, seeds=[1])
    plain, l2e = (begin_run(study, runs, f"{method}-seed1") for method in ("none", "l2e"))
    own = [evaluation(20, 0, {"piqa": 0.5}), evaluation(20, 0, {"sciq": 0.6}, limit=10)]
    by_hand = [
        evaluation(20, 0, {"piqa": 0.1, "arc_easy": 0.7}, limit=10),
        evaluation(20, 0, {"piqa": 0.2, "sciq": 0.6, "arc_easy": 0.1}, limit=10),  # also an answer, but not for piqa
        evaluation(20, 0, {"piqa": 0.3}, precision="bf16"),
        evaluation(20, 0, {"sciq": 0.1, "arc_easy": 0.8}, limit=20),
        evaluation(20, 0, {"arc_easy": 0.2}, limit=5),
        evaluation(20, 0, {"arc_easy": 0.9, "sciq": 0.2}),
        evaluation(20, 0, {"arc_easy": 0.3}, limit=30),
        evaluation(10, 0, {"arc_easy": 0.1}),
    ]
    write_lines(plain / "evaluations.jsonl", [*own, *by_hand])
    write_lines(l2e / "evaluations.jsonl", by_hand)
    table = collect(study.directory).set_index("run")
    names = ["piqa/0-shot/acc", "sciq/0-shot/acc", "arc_easy/0-shot/acc"]
    assert table.loc["none-seed1", names].tolist() == [0.5, 0.6, 0.9]
    # piqa is left empty until the study has had it evaluated
    found = table.loc["l2e-seed1", names].tolist()
    assert math.isnan(found[0]) and found[1:] == [0.6, 0.9]


def test_runs_that_have_not_begun_are_empty_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study, runs = begun_study(tmp_path)
    run = begin_run(study, runs, "l2e-seed1")
    write_lines(run / "metrics.jsonl", metrics(5.0, 1.0)[:4])
    checkpoint(run, 10)
    table = collect(study.directory).set_index("run")
    assert table["state"].tolist() == ["not begun", "at step 10", *["not begun"] * 4]
    assert table["held_out_loss"].count() == 1 and table.loc["l2e-seed1", "held_out_loss"] == 9.0
    assert (table.loc["l2e-seed1", "step"], table.loc["l2e-seed1", "evaluated_step"]) == (10, 0)
    assert "nan" not in summary(table.reset_index())


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("metrics.jsonl", {"a": 1}, "is no line of a run's metrics"),
        ("metrics.jsonl", 3, "is no line of a run's metrics"),
        ("metrics.jsonl", {"kind": "evaluation", "step": 20, "tokens": 1}, "has no held_out_loss"),
        ("evaluations.jsonl", {"a": 1}, "is no evaluation; remove the line"),
        ("evaluations.jsonl", 3, "is no evaluation; remove the line"),
    ],
)
def test_a_line_that_is_something_else_is_told(table, name, line, said):
    path = Path("out/runs/l2e-seed2") / name
    place = len(path.read_text().splitlines()) + 1
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:{place}: {said}")):
        collect(Path("out"))


def test_figures_that_an_older_version_did_not_write_are_empty(table):
    path = Path("out/runs/l2e-seed2/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    without = ("step_seconds", "peak_memory_gib")
    write_lines(path, [{key: value for key, value in line.items() if key not in without} for line in lines])
    row = collect(Path("out")).set_index("run").loc["l2e-seed2"]
    assert row[[*without]].isna().all() and row["held_out_loss"] == 5.2


def test_ended_runs_alone_decide_whether_another_task_has_written_meanwhile(table, monkeypatch):
    """A task would go on for as long as any of the others trains."""
    reads = []

    def collect_while_another_trains(directory):
        found = collect(directory)
        reads.append(found)
        assert len(reads) < 5
        found.loc[len(found)] = {"run": "none-seed9", "state": "at step 5", "step": len(reads)}
        return found

    monkeypatch.setattr(array_task, "collect", collect_while_another_trains)
    monkeypatch.setattr(array_task.job, "entry_of_this_task", lambda path: ["out/configs/none-seed1.yaml"])
    monkeypatch.setattr(array_task.job, "prepare_environment", lambda: None)  # which asks SLURM
    assert array_task.main(["out/slurm-1/list", "--", "srun", "python", "-m", "l2e_ds.train"]) == 0
    assert len(reads) == 2
    assert set(pd.read_csv("out/results.csv")["run"]) == {*table["run"], "none-seed9"}


def test_an_index_that_asks_for_something_else_is_told(table):
    path = Path("out/study.json")
    index = json.loads(path.read_text())
    for evaluate, said in (
        ([{"tasks": ["arc_easy"], "limt": 3}], "evaluate.0.limt: unknown key; did you mean 'limit'"),
        ([{"tasks": 3}], "evaluate.0.tasks: got 3"),
        (7, "evaluate: got 7"),
    ):
        path.write_text(json.dumps(index | {"evaluate": evaluate}))
        with pytest.raises(ConfigError, match=re.escape(f"{path}: {said}")):
            collect(Path("out"))
