"""Every number of the tables, computed by hand."""

import csv
import io
import json
import math
import shutil

import pytest

from l2e_ds.report import published, runs, tables
from l2e_ds.report.statistics import Measured
from l2e_ds.report.table import Column, Table, about_errors, text_of
from l2e_ds.run_directory.json_lines import append_line
from l2e_ds.run_directory.metrics import after_first_intervals
from l2e_ds.run_directory.results import FILE
from tests.unit.report.making import add_results, paired_study, write_run


def table(page, name):
    return next((one for one in tables.all_tables(page) if one.name == name), None)


def cells(found):
    """first cell of the row -> full head of the column -> cell"""
    heads = [column.full_head for column in found.columns]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in found.rows}


# --- published figures -------------------------------------------------------------------------------------------


PUBLISHED = """
mmlu 0           .2311/.2301, .2303/.2306, .2306/.2534
mmlu 5           .2438/.2497, .2470/.2472, .2432/.2443
bigbench_lite 0  .2188/.2242, .2198/.2199, .2321/.2313
bigbench_lite 5  .2140/.2235, .2377/.2266, .2252/.2320
arc_challenge 0  .1706/.1877, .1852/.2031, .2304/.2304
arc_challenge 5  .1834/.1860, .1988/.2056, .2346/.2415
arc_easy 0       .3880/.3813, .4545/.4423, .5223/.5042
arc_easy 5       .3708/.3864, .4811/.4798, .5522/.5358
"""
"""Benchmark, shots; of 70m, 410m and 2.8b Pythia/L2E: as Wang et al. 2025 have them."""


def test_published_figures():
    written = {}
    for line in PUBLISHED.strip().splitlines():
        task, shots, figures = line.split(maxsplit=2)
        for size, both in zip(("70m", "410m", "2.8b"), figures.split(", "), strict=True):
            for method, figure in zip(("none", "l2e"), both.split("/"), strict=True):
                written[task, int(shots), size, method] = float(figure)
    assert len(written) == 48
    assert {one: published.benchmark(*one) for one in written} == written
    assert len(published.BENCHMARKS) == 8
    assert published.TOKENS == 14_300 * 1024 * 2048
    assert published.BEST_SHARE == {"70m": 0.01, "410m": 0.02, "2.8b": 0.03}
    assert published.EXTRA_TIME == {
        ("l2e", "70m"): 0.034,
        ("l2e", "2.8b"): 0.015,
        ("memel", "70m"): 0.097,
        ("memel", "2.8b"): 0.270,
    }


@pytest.mark.parametrize(
    "features, parameters, figure",
    [
        ("natural_language", 70_426_624, 0.052),
        ("Data-Subset of the Pile", 70_426_624, 0.218),
        ("me/code_language@main", 70_426_624, 0.67),
        ("languages", 70_426_624, None),
        ("natural_language", 405_334_016, None),
    ],
)
def test_published_false_killing_rates(features, parameters, figure):
    assert published.fkr(features, parameters) == figure


@pytest.mark.parametrize(
    "task, shots, size, method",
    [("mmlu", 1, "70m", "l2e"), ("piqa", 0, "70m", "l2e"), ("mmlu", 0, "160m", "l2e"), ("mmlu", 0, "70m", "memel")],
)
def test_there_is_no_other(task, shots, size, method):
    assert published.benchmark(task, shots, size, method) is None


# --- evaluation tasks --------------------------------------------------------------------------------------------


def test_benchmarks_of_one_seed(tmp_path):
    study = paired_study(tmp_path / "study", seeds=(1234,))
    add_results(study / "runs/70m-none-seed1234", 100, {("mmlu", 0): (0.24, 0.003), ("piqa", 0): (0.5, None)})
    add_results(study / "runs/70m-l2e-seed1234", 100, {("mmlu", 0): (0.25, 0.004), ("piqa", 0): (0.6, 0.01)})
    found = table(runs.read([study]), "benchmarks")
    mmlu, piqa = (cells(found)[name] for name in ("MMLU", "piqa"))
    assert mmlu["70m none: ours"] == Measured(0.24, 0.003)
    assert mmlu["70m none: published"] == 0.2311
    assert mmlu["70m none: ours − published"] == Measured(pytest.approx(0.0089), 0.003)
    assert mmlu["70m l2e: published"] == 0.2301
    assert mmlu["70m l2e − none: ours"] == Measured(pytest.approx(0.01), pytest.approx(0.005))  # a triangle of 3, 4, 5
    assert mmlu["70m l2e − none: published"] == pytest.approx(-0.0010)
    assert piqa["70m l2e: ours"] == Measured(0.6, 0.01)
    assert piqa["70m l2e: published"] is None
    assert piqa["70m l2e − none: ours"] == Measured(pytest.approx(0.1), None)  # of one of them it is not known
    assert "acc, not acc_norm" in found.note
    assert "29,989,273,600" in found.note


def test_benchmarks_of_two_seeds(tmp_path):
    study = paired_study(tmp_path / "study")
    figures = {"none-seed1234": 0.20, "none-seed1235": 0.24, "l2e-seed1234": 0.21, "l2e-seed1235": 0.27}
    for name, accuracy in figures.items():
        add_results(study / f"runs/70m-{name}", 100, {("arc_easy", 0): (accuracy, 0.03)})
    row = cells(table(runs.read([study]), "benchmarks"))["ARC-Easy"]
    # documents 0.03; seeds: standard deviation of 0.20 and 0.24 over sqrt(2) is 0.02
    assert row["70m none: ours"] == Measured(pytest.approx(0.22), pytest.approx(math.hypot(0.03, 0.02)), 2)
    # pairs: 0.01 and 0.03
    assert row["70m l2e − none: ours"] == Measured(pytest.approx(0.02), pytest.approx(0.01), 2)


def test_results_in_another_precision_are_not_compared(tmp_path):
    """Both were evaluated in bf16 while training, and one again in fp32."""
    study = paired_study(tmp_path / "study", seeds=(1,))
    for name, accuracy in {"none": 0.26, "l2e": 0.25}.items():
        add_results(study / f"runs/70m-{name}-seed1", 100, {("arc_easy", 0): (accuracy, 0.03)}, precision="bf16")
    add_results(study / "runs/70m-l2e-seed1", 100, {("arc_easy", 0): (0.27, 0.03)}, precision="fp32")
    page = runs.read([study])
    row = cells(table(page, "benchmarks"))["ARC-Easy"]
    assert row["70m l2e: ours"].value == pytest.approx(0.27)
    assert row["70m l2e − none: ours"].value == pytest.approx(-0.01)
    found = table(page, "evaluations")
    (place,) = [place for place, column in enumerate(found.columns) if column.full_head == "precision"]
    assert sorted(row[place] for row in found.rows) == ["bf16"] * 4 + ["fp32"] * 2  # acc and acc_norm of each


def test_rows_are_those_of_the_paper_first(tmp_path):
    run = write_run(tmp_path / "none", "none")
    wanted = [("zebra", 0), ("arc_easy", 5), ("mmlu", 5), ("mmlu_anatomy", 5), ("mmlu", 0), ("bigbench_lite", 0)]
    add_results(run, 100, dict.fromkeys(wanted, (0.3, 0.01)))
    page = runs.read([run])
    assert [row[:2] for row in table(page, "benchmarks").rows] == [
        ["MMLU", 0],
        ["MMLU", 5],
        ["BIG-bench lite", 0],
        ["ARC-Easy", 5],
        ["zebra", 0],
    ]
    parts = [row for row in table(page, "evaluations").rows if row[2] == "mmlu_anatomy"]
    assert len(parts) == 2  # acc and acc_norm


def test_newest_step_and_all_documents_count(tmp_path):
    run = write_run(tmp_path / "none", "none")
    add_results(run, 50, {("mmlu", 0): (0.21, 0.01), ("piqa", 0): (0.51, 0.01)})
    add_results(run, 100, {("mmlu", 0): (0.22, 0.01)})
    add_results(run, 100, {("mmlu", 0): (0.29, 0.05)}, limit=100)
    found = cells(table(runs.read([run]), "benchmarks"))
    assert (found["MMLU"]["none: ours"].value, found["MMLU"]["none: step"]) == (0.22, 100)
    assert (found["piqa"]["none: ours"].value, found["piqa"]["none: step"]) == (0.51, 50)


def test_models_are_compared_at_a_step_that_both_have(tmp_path):
    """0.25 to 0.30 at step 50; the baseline's 0.40 at step 100 has nothing beside it."""
    study = paired_study(tmp_path / "study", seeds=(1234,))
    none, l2e = (study / f"runs/70m-{method}-seed1234" for method in ("none", "l2e"))
    add_results(none, 50, {("mmlu", 0): (0.25, 0.003)})
    add_results(none, 100, {("mmlu", 0): (0.40, 0.02)})
    add_results(l2e, 50, {("mmlu", 0): (0.30, 0.004)})
    row = cells(table(runs.read([study]), "benchmarks"))["MMLU"]
    assert (row["70m none: ours"], row["70m none: step"]) == (Measured(0.40, 0.02), 100)
    assert (row["70m l2e: ours"], row["70m l2e: step"]) == (Measured(0.30, 0.004), 50)
    assert row["70m l2e − none: ours"] == Measured(pytest.approx(0.05), pytest.approx(0.005))
    assert row["70m l2e − none: step"] == 50


def test_seeds_are_averaged_at_a_step_that_all_have(tmp_path):
    study = paired_study(tmp_path / "study")
    for method, better in (("none", 0.0), ("l2e", 0.1)):
        for seed in (1234, 1235):
            run = study / f"runs/70m-{method}-seed{seed}"
            add_results(run, 50, {("mmlu", 0): (0.2 + better, 0.01)})
            if (method, seed) != ("l2e", 1235):
                add_results(run, 100, {("mmlu", 0): (0.6, 0.01)})
    row = cells(table(runs.read([study]), "benchmarks"))["MMLU"]
    assert (row["70m none: ours"].value, row["70m none: step"]) == (pytest.approx(0.6), 100)
    assert (row["70m l2e: ours"].value, row["70m l2e: step"]) == (pytest.approx(0.3), 50)
    assert (row["70m l2e − none: ours"].value, row["70m l2e − none: step"]) == (pytest.approx(0.1), 50)


def test_first_documents_are_not_compared_with_all(tmp_path):
    """Both were evaluated at step 100, on all documents only one of them."""
    study = paired_study(tmp_path / "study", seeds=(1234,))
    none, l2e = (study / f"runs/70m-{method}-seed1234" for method in ("none", "l2e"))
    add_results(none, 100, {("mmlu", 0): (0.25, 0.003)})
    add_results(l2e, 100, {("mmlu", 0): (0.9, 0.1)}, limit=20)
    row = cells(table(runs.read([study]), "benchmarks"))["MMLU"]
    assert (row["70m none: step"], row["70m l2e: step"]) == (100, "100, first 20")
    assert "70m l2e − none: ours" not in row
    add_results(none, 100, {("mmlu", 0): (0.7, 0.1)}, limit=20)
    found = table(runs.read([study]), "benchmarks")
    assert cells(found)["MMLU"]["70m none: ours"].value == 0.25
    assert cells(found)["MMLU"]["70m l2e − none: ours"].value == pytest.approx(0.2)
    assert cells(found)["MMLU"]["70m l2e − none: step"] == "100, first 20"
    assert "of this many documents of each task only" in found.note


def test_note_of_the_tasks(tmp_path):
    study = paired_study(tmp_path / "study", seeds=(1234,))
    for method in ("none", "l2e"):
        add_results(study / f"runs/70m-{method}-seed1234", 50, {("bigbench_lite", 0): (0.25, 0.01)}, limit=20)
    found = table(runs.read([study]), "benchmarks")
    assert cells(found)["BIG-bench lite"]["70m none: step"] == "50, first 20"
    assert "of this many documents of each task only" in found.note
    assert "18 of its 24 tasks" in found.note
    assert "Ours: after 204,800 tokens." in found.note  # 50 steps of 16 x 256


def test_what_the_paper_did_not_train_has_no_published_figure(tmp_path):
    other = {"scale": {"inhibition__loss": "scale-invariant"}, "mechanism": {"inhibition__retrieval": "top-k"},
             "small": {"model__num_layers": 4}, "memel": {"method": "memel"}, "big": {"size": "160m"},
             "all": {"inhibition__layers": "all"}, "two": {"inhibition__layers": [2, 3]},
             "share": {"inhibition__target_share": 0.02}}  # fmt: skip
    best = {"inhibition__target_share": 0.01}
    folders = [write_run(tmp_path / name, **{**best, **keys}) for name, keys in {**other, "plain": {}}.items()]
    for folder in folders:
        add_results(folder, 100, {("mmlu", 0): (0.25, 0.01)})
    found = table(runs.read(folders), "benchmarks")
    row = cells(found)["MMLU"]
    assert [head for head, cell in row.items() if head.endswith(": published") and cell is not None] == [
        "70m plain: published"
    ]
    assert "1% at 70m, 2% at 410m, 3% at 2.8b), and the time of MEmeL. There are none for other layers" in found.note
    assert "for other layers" not in table(runs.read(folders[-1:]), "benchmarks").note


def test_published_time_is_that_of_the_published_share_and_layers(tmp_path):
    keys = {"best": {}, "share": {"inhibition__target_share": 0.02}, "all": {"inhibition__layers": "all"}}
    best = {"inhibition__target_share": 0.01}
    folders = [write_run(tmp_path / name, "memel", **{**best, **own}) for name, own in keys.items()]
    found = cells(table(runs.read(folders), "time"))
    assert {name: row["published"] for name, row in found.items()} == {"best": 0.097, "share": None, "all": None}


def test_task_without_accuracy(tmp_path):
    run = write_run(tmp_path / "none", "none")
    metrics = {"perplexity": {"value": 30.0, "stderr": 1.0, "higher_is_better": False}}
    task = {"samples": 10, "cut": 0, "num_fewshot": 0, "version": 1, "part_of": None, "metrics": metrics}
    append_line(run / FILE, {"step": 100, "tokens": 1, "limit": None, "tasks": {"wikitext": task}})
    assert cells(table(runs.read([run]), "benchmarks"))["wikitext (perplexity)"]["none: ours"] == Measured(30.0, 1.0)


# --- loss, time, shares ------------------------------------------------------------------------------------------


def test_losses_of_pairs(tmp_path):
    found = cells(table(runs.read([paired_study(tmp_path / "study")]), "variants"))
    assert found["70m none"]["held-out loss: mean"] == Measured(pytest.approx(5.025), pytest.approx(0.025), 2)
    # 5.0 to 4.9, 5.05 to 4.85: -0.1 and -0.2
    difference = Measured(pytest.approx(-0.15), pytest.approx(0.05), 2)
    assert found["70m l2e"]["against the baseline: difference"] == difference
    assert found["70m l2e"]["against the baseline: which"] == "70m none"
    assert found["70m none"]["against the baseline: difference"] is None


def test_copied_run_is_no_further_seed(tmp_path):
    """Means, standard errors and pairs are those without it."""
    seeds = (1, 2)
    given = [write_run(tmp_path / f"none-{seed}", "none", seed, loss=5.0 + seed) for seed in seeds]
    given += [write_run(tmp_path / f"l2e-{seed}", "l2e", seed, loss=4.5 + 2 * seed) for seed in seeds]
    add_results(given[2], 100, {("mmlu", 0): (0.25, 0.01)})
    add_results(given[3], 100, {("mmlu", 0): (0.35, 0.01)})
    shutil.copytree(given[2], tmp_path / "copy")
    names = ("variants", "benchmarks", "time")
    without, copied = (runs.read(folders) for folders in (given, [*given, tmp_path / "copy"]))
    assert len(copied.runs) == 5
    assert [table(copied, name).rows for name in names] == [table(without, name).rows for name in names]
    assert cells(table(copied, "variants"))["l2e"]["held-out loss: mean"] == Measured(pytest.approx(7.5), 1.0, 2)
    alone = runs.read([given[2], tmp_path / "copy"])
    assert cells(table(alone, "variants"))["l2e"]["held-out loss: mean"] == Measured(pytest.approx(6.5), None)


def test_runs_that_go_on_are_compared_at_a_common_step(tmp_path):
    """One seed has got to step 60 of 100, where the loss is 1.2 above the last."""
    none = [write_run(tmp_path / f"none{seed}", "none", seed, loss=5.0) for seed in (1, 2)]
    l2e = [
        write_run(tmp_path / f"l2e{seed}", "l2e", seed, loss=4.0, until=until) for seed, until in ((1, 100), (2, 66))
    ]
    row = cells(table(runs.read([*none, *l2e]), "variants"))["l2e"]
    assert row["held-out loss: mean"] == Measured(pytest.approx(5.2), pytest.approx(0), 2)
    assert row["held-out loss: step"] == 60
    assert row["against the baseline: difference"] == Measured(pytest.approx(-1.0), pytest.approx(0, abs=1e-9), 2)
    assert row["against the baseline: step"] == 60


def test_single_run_has_nothing_to_be_compared_with(tmp_path):
    names = [one.name for one in tables.all_tables(runs.read([write_run(tmp_path / "l2e")]))]
    assert names == ["time", "runs", "layers", "machines"]


def test_time(tmp_path):
    found = cells(table(runs.read([paired_study(tmp_path / "study")]), "time"))
    row = found["70m l2e"]
    assert row["seconds a step"] == Measured(pytest.approx(0.55), pytest.approx(0), 2)  # not the first line's 27.5
    assert row["over the baseline"].value == pytest.approx(0.10)
    assert row["published"] == 0.034
    assert row["ours − published"].value == pytest.approx(0.066)
    assert found["70m none"]["published"] is None


def test_time_is_that_of_the_studies(tmp_path):
    """Both leave out the first line after each start, also if the run was resumed from a logged step."""
    path = write_run(tmp_path / "l2e", seconds=0.5) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    place = next(i for i, line in enumerate(lines) if line["step"] == 90 and line["kind"] == "evaluation") + 1
    lines = [lines[0], *(line for line in lines[:place] if line["step"] >= 90), {"kind": "start", "step": 90},
             *({**line, "step_seconds": 9.0 - line["step"] / 20} for line in lines[place:])]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # 90 is the first line of the first start, 92 of the second: 94 to 100 are left
    assert cells(table(runs.read([tmp_path / "l2e"]), "time"))["l2e"]["seconds a step"].value == pytest.approx(4.15)
    steady = after_first_intervals(lines)
    assert [line["step"] for line in steady] == [94, 96, 98, 100]


def test_best_share(tmp_path):
    losses = {0.01: 4.9, 0.02: 4.8, 0.05: 5.2}
    folders = [
        write_run(tmp_path / str(share), loss=loss, inhibition__target_share=share) for share, loss in losses.items()
    ]
    row = cells(table(runs.read(folders), "shares"))["70m"]
    assert row["target shares tried"] == "0.01, 0.02, 0.05"
    assert row["best share: ours"] == 0.02
    assert row["best share: published"] == 0.01
    assert row["best share: its held-out loss"].value == pytest.approx(4.8)


def test_shares_are_compared_at_a_common_step(tmp_path):
    """The run of 1 % is behind; at step 50 it was the better one."""
    ahead = write_run(tmp_path / "ahead", loss=5.0, inhibition__target_share=0.02)
    behind = write_run(tmp_path / "behind", loss=4.9, inhibition__target_share=0.01, until=50)
    row = cells(table(runs.read([ahead, behind]), "shares"))["70m"]
    assert (row["best share: ours"], row["best share: step"]) == (0.01, 50)
    assert row["best share: its held-out loss"].value == pytest.approx(6.4)


def test_shares_are_compared_over_common_seeds(tmp_path):
    """The share with the lowest single run has it with a seed that the other share was not trained with."""
    losses = {(0.01, 1): 5.0, (0.02, 1): 5.1, (0.02, 2): 3.0, (0.05, 1): 5.2}
    folders = [
        write_run(tmp_path / f"{share}-{seed}", seed=seed, loss=loss, inhibition__target_share=share)
        for (share, seed), loss in losses.items()
    ]
    row = cells(table(runs.read(folders), "shares"))["70m"]
    assert row["best share: ours"] == 0.01
    assert row["best share: its held-out loss"] == Measured(pytest.approx(5.0))
    other = write_run(tmp_path / "other", seed=3, loss=1.0, inhibition__target_share=0.1)
    assert table(runs.read([*folders, other]), "shares") is None  # no seed is common to all


# --- each run ----------------------------------------------------------------------------------------------------


def test_runs_and_layers(tmp_path):
    folder = write_run(tmp_path / "l2e", shrink=0.4, skipped=3, share=0.025, dead=0.1)
    page = runs.read([folder])
    row = cells(table(page, "runs"))["l2e"]
    assert (row["step"], row["tokens"], row["skipped steps"], row["memory, GiB"]) == (100, 409600, 3, 1.5)
    assert row["LM loss: training"] == pytest.approx(5.0 + 3 * 0.04)  # mean of steps 92 to 100
    assert (row["LM loss: held out, first"], row["LM loss: held out, last"]) == (8.0, 5.0)
    assert (row["share: observed"], row["share: target"]) == (pytest.approx(0.025), 0.02)
    first = table(page, "layers").rows[0]
    assert first == ["l2e", 2, 16.0, 16.0, 0.3, pytest.approx(0.12), pytest.approx(0.4), 7.0, 7.0, 0.0, 0.1, 4.0]


def test_layers_for_comparison(tmp_path):
    """Rows of their own in the table of layers; no mean over layers takes them in."""
    folders = [write_run(tmp_path / name, name, loss=4.9) for name in ("none", "l2e")]
    before = table(runs.read(folders), "variants").rows
    path = folders[1] / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "evaluation":
            own = {key: value for key, value in line.items() if key.startswith("layer2/")}
            line |= {f"comparison_layer1/{key.partition('/')[2]}": 2 * value for key, value in own.items()}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = runs.read(folders)
    assert table(page, "variants").rows == before
    assert page.runs[1].layers == [2, 3] and page.runs[1].comparison_layers == [1]
    assert [row[:5] for row in table(page, "layers").rows] == [
        ["none", 2, "no", 16.0, 16.0],
        ["none", 3, "no", 17.0, 17.0],
        ["l2e", 1, "no", 32.0, 32.0],
        ["l2e", 2, "yes", 16.0, 16.0],
        ["l2e", 3, "yes", 17.0, 17.0],
    ]


def test_run_without_inhibition_has_no_share_and_no_tau(tmp_path):
    page = runs.read([write_run(tmp_path / "none", "none")])
    for name in ("runs", "layers"):
        heads = [column.full_head for column in table(page, name).columns]
        assert not [head for head in heads if head.startswith(("share", "tau"))], heads


def test_mixture(tmp_path):
    sets = [{"name": name, "weight": 1.0, "source": "stdlib"} for name in ("prose", "code")]
    data = {"data__sets": sets, "data__source": None, "data__train_tokenizer": None, "data__tokenizer": "t.json"}
    found = table(runs.read([write_run(tmp_path / "l2e", **data)]), "sets")
    assert [row[:4] for row in found.rows] == [["l2e", "prose", 13.0, 10.0], ["l2e", "code", 12.0, 9.0]]


def test_texts(tmp_path):
    run = write_run(tmp_path / "l2e", evaluation__texts=[{"name": "own", "source": "stdlib"}])
    found = table(runs.read([run]), "texts")
    assert found.rows == [["l2e", "own", 9.0, 6.0, pytest.approx(math.exp(6)), 2.0, 1.25]]
    assert [column.full_head for column in found.columns][3:] == [
        *("LM loss: last", "perplexity, last", "bits a byte: first", "bits a byte: last")
    ]


# --- what was run ------------------------------------------------------------------------------------------------


def test_only_keys_that_differ(tmp_path):
    page = runs.read([write_run(tmp_path / "none", "none"), write_run(tmp_path / "l2e", inhibition__coefficient=0.5)])
    found = table(page, "configurations")
    assert [column.head for column in found.columns] == ["run", "inhibition.method", "inhibition.coefficient"]
    assert found.rows == [["none", "none", None], ["l2e", "l2e", "0.5"]]


def test_machines(tmp_path):
    row = cells(table(runs.read([write_run(tmp_path / "l2e")]), "machines"))["l2e"]
    assert row["git commit"] == "0123456789ab"
    assert (row["time"], row["host"], row["ranks"], row["versions"]) == (
        "2026-11-25T09:00:00Z",
        "node1",
        2,
        "l2e_ds 0.1.0",
    )


# --- plus or minus -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell, text",
    [
        (Measured(-0.15, 0.05, 2), "−0.1500 ± 0.0500 (n = 2)"),
        (Measured(0.24, 0.003), "+0.2400 ± 0.0030"),  # over documents
        (Measured(5.0), "+5.0000"),
    ],
)
def test_a_value_says_over_how_many_seeds_its_error_is(cell, text):
    assert text_of(cell, "+.4f") == text


def test_what_plus_or_minus_is():
    """Two seeds have a half-range, and nobody's interval."""
    assert about_errors(["a", Measured(1.0), Measured(0.24, 0.003), None]) == []
    assert about_errors(["a", Measured(1.0, 0.1, 3)]) == [
        "±: standard error over n seeds, of a difference over n pairs."
    ]
    assert "With n = 2 it is half the distance" in about_errors([Measured(1.0, 0.1, 3), Measured(1.0, 0.1, 2)])[1]


@pytest.mark.parametrize("seeds, two", [((1234,), False), ((1234, 1235), True), ((1, 2, 3), False)])
def test_notes_of_the_tables_say_it(tmp_path, seeds, two):
    page = runs.read([paired_study(tmp_path / "study", seeds=seeds)])
    for name in ("variants", "time"):
        note = table(page, name).note
        assert ("±: standard error over n seeds" in note) == (len(seeds) > 1)
        assert ("With n = 2" in note) == two
    cell = cells(table(page, "variants"))["70m l2e"]["against the baseline: difference"]
    assert cell.n == len(seeds)
    gains = [0.1 * (place + 1) for place in range(len(seeds))]
    if two:
        assert cell.error == pytest.approx((gains[1] - gains[0]) / 2)  # what the note says


# --- as files ----------------------------------------------------------------------------------------------------


def an_example():
    columns = [Column("run"), Column("ours", "+.2f", "x"), Column("tokens", ",d")]
    rows = [["a|b <i>", Measured(-0.123456, 0.01), 1000], ["c", None, None]]
    return Table("name", "A <title>", "A note.", columns, rows)


def test_csv_has_all_digits():
    rows = list(csv.reader(io.StringIO(an_example().csv())))
    assert rows == [
        ["run", "x: ours", "x: ours, standard error", "tokens"],
        ["a|b <i>", "-0.123456", "0.01", "1000"],
        ["c", "", "", ""],
    ]


def test_csv_says_over_how_many_seeds():
    rows = [["a", Measured(0.5, 0.125, 2)], ["b", Measured(0.25)], ["c", None]]
    written = Table("name", "A title", "", [Column("run"), Column("ours", ".2f")], rows).csv()
    assert list(csv.reader(io.StringIO(written))) == [
        ["run", "ours", "ours, standard error", "ours, n"],
        ["a", "0.5", "0.125", "2"],
        ["b", "0.25", "", "1"],
        ["c", "", "", ""],
    ]


def test_markdown():
    lines = an_example().markdown().splitlines()
    assert lines[0] == "## A &lt;title&gt;"
    assert "| a\\|b &lt;i&gt; | −0.12 ± 0.01 | 1,000 |" in lines
    assert "| c | – | – |" in lines
    assert lines[-1] == "A note."


def test_groups_of_heads():
    assert an_example().groups() == [("", 1), ("x", 1), ("", 1)]
    assert Table("n", "t", "", [Column("a"), Column("b")], []).groups() == []


def test_first_column_has_a_heading_of_its_own():
    """It stays in view, and would cover the others' if they shared one."""
    columns = [Column("run"), Column("step"), Column("tokens"), Column("first", "", "loss"), Column("last", "", "loss")]
    assert Table("n", "t", "", columns, []).groups() == [("", 1), ("", 2), ("loss", 2)]
