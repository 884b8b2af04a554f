"""What is read from run directories and studies, and which runs are compared."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from l2e_ds.errors import DataError
from l2e_ds.report import runs
from l2e_ds.run_directory.metrics import mean_of_last_tenth, number
from tests.unit.report.making import STEPS, add_results, paired_study, write_run, write_study


def names(variants):
    return [(variant.name, variant.treatment, [run.name for run in variant.runs]) for variant in variants]


def test_run(tmp_path):
    write_run(tmp_path / "l2e", until=40)
    add_results(tmp_path / "l2e", 40, {("mmlu", 0): (0.25, 0.01)})
    page = runs.read([tmp_path / "l2e"])
    (run,) = page.runs
    assert (run.name, run.method, run.seed, run.size, run.step, run.steps) == ("l2e", "l2e", 1234, "70m", 40, STEPS)
    assert (run.tokens, run.layers, len(run.starts), len(run.results)) == (40 * 4096, [2, 3], 1, 2)
    assert names(page.variants) == [("l2e", "l2e", ["l2e"])]


def test_run_that_is_being_written(tmp_path):
    path = write_run(tmp_path / "l2e", until=40) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 42, "tok')
    assert runs.read([tmp_path / "l2e"]).runs[0].step == 40


def test_results_of_steps_that_a_run_has_not_come_to_again(tmp_path):
    """It goes on from step 40; what was evaluated at 60 before is not its newest."""
    run = write_run(tmp_path / "l2e", until=40)
    for step in (40, 60):
        add_results(run, step, {("mmlu", 0): (0.25, 0.01)})
    assert {one.step for one in runs.read([run]).runs[0].results} == {40}


@pytest.mark.parametrize(
    "name, content, words",
    [
        (None, None, "there is no such folder"),
        ("other.txt", "", "is no run directory, or has no metrics yet"),
        ("metrics.jsonl", '{"kind": "start", "step": 0}\n', "has no metrics yet"),
        ("study.json", '{"title": "", "factors": {}, "seeds": [], "evaluate": [], "runs": []}', "none of its 0 runs"),
    ],
)
def test_no_run_or_study(tmp_path, name, content, words):
    folder = tmp_path / "given"
    if name is not None:
        folder.mkdir()
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=words) as raised:
        runs.read([folder])
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_nothing_written_yet(tmp_path):
    folder = write_run(tmp_path / "l2e")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])  # its start
    with pytest.raises(DataError, match=r"metrics\.jsonl: has no metrics yet"):
        runs.read([folder])


def test_key_that_an_older_run_does_not_have(tmp_path):
    """It has the default, and so differs from nothing."""
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    config = yaml.safe_load((first / "config.yaml").read_text())
    del config["inhibition"]["warmup"]
    (first / "config.yaml").write_text(yaml.safe_dump(config))
    found = runs.read([first, second]).runs
    assert runs.differing([run.config for run in found]) == ["training.run_directory"]


def test_same_names_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write_run(tmp_path / folder / "x" / "l2e")
    write_run(tmp_path / "none", "none")
    page = runs.read([tmp_path / "a/x/l2e", tmp_path / "b/x/l2e", tmp_path / "none"])
    assert [run.name for run in page.runs] == [*(str(tmp_path / folder / "x/l2e") for folder in ("a", "b")), "none"]


# --- variants and baselines --------------------------------------------------------------------------------------


def test_seeds_of_one_variant(tmp_path):
    folders = [
        write_run(tmp_path / f"{method}-{share}-{seed}", method, seed, inhibition__target_share=share)
        for method, share in (("none", 0.02), ("l2e", 0.02), ("l2e", 0.03))
        for seed in (1, 2)
    ]
    page = runs.read(folders)
    assert [(variant.name, len(variant.runs)) for variant in page.variants] == [
        ("none", 2),
        ("l2e, target_share 0.02", 2),
        ("l2e, target_share 0.03", 2),
    ]
    assert [base and base.name for base in map(page.baseline_of, page.runs)][1:4] == [
        None,
        "none-0.02-1",
        "none-0.02-2",
    ]
    assert page.baseline_variant(page.variants[1]) is page.variants[0]


def test_variants_of_one_model_have_names_of_their_own(tmp_path):
    """Two revisions of pretrained weights, of two seeds each; neither is set against the paper's runs from scratch."""
    folders = []
    for revision in ("step1000", "step143000"):
        for seed in (1, 2):
            origin = {"model__name": None, "model__pretrained": "EleutherAI/pythia-70m", "model__revision": revision}
            folders.append(write_run(tmp_path / f"{revision}-{seed}", "none", seed, **origin))
    page = runs.read(folders)
    assert [variant.name for variant in page.variants] == ["none, revision step1000", "none, revision step143000"]
    assert page.runs[0].size == "70m" and not page.runs[0].is_published_method


@pytest.mark.parametrize(
    "keys, paired",
    [
        ({}, True),
        ({"training__micro_batch": 4, "checkpoint__every": 7, "logging__every": 3, "data__workers": 1}, True),
        ({"training__seed": 5}, False),
        ({"training__global_batch": 32}, False),
        ({"optimizer__weight_decay": 0.01}, False),
        ({"data__max_tokens": 100}, False),
    ],
)
def test_baseline_is_the_same_in_all_that_decides_figures(tmp_path, keys, paired):
    page = runs.read([write_run(tmp_path / "none", "none"), write_run(tmp_path / "l2e", **keys)])
    base = page.baseline_of(page.runs[1])
    assert (base.name if base else None) == ("none" if paired else None)
    assert page.baseline_of(page.runs[0]) is None


def test_sizes(tmp_path):
    plain = write_run(tmp_path / "plain")
    small = write_run(tmp_path / "small", model__num_layers=4, model__hidden_size=64, model__num_heads=4)
    assert [run.size for run in runs.read([plain, small]).runs] == [
        "70m",
        "70m (num_layers 4, hidden_size 64, num_heads 4)",
    ]


def test_study(tmp_path):
    paired_study(tmp_path / "main", ("70m", "410m"))
    shutil.move(tmp_path / "main", tmp_path / "moved")
    page = runs.read([tmp_path / "moved"])
    assert page.titles == ["Main comparison"]
    assert page.waiting == []
    assert names(page.variants)[1] == ("70m l2e", "l2e", ["70m-l2e-seed1234", "70m-l2e-seed1235"])
    by_name = {run.name: run for run in page.runs}
    assert page.baseline_of(by_name["410m-l2e-seed1235"]) is by_name["410m-none-seed1235"]
    assert page.baseline_variant(page.variants[3]) is page.variants[2]


def test_study_that_has_just_begun(tmp_path):
    study = paired_study(tmp_path / "main")
    shutil.rmtree(study / "runs/70m-none-seed1235")
    (study / "runs/70m-l2e-seed1234/metrics.jsonl").write_text('{"kind": "start", "step": 0}\n')
    page = runs.read([study])
    assert [run.name for run in page.runs] == ["70m-none-seed1234", "70m-l2e-seed1235"]
    assert page.waiting == ["70m-l2e-seed1234", "70m-none-seed1235"]
    assert page.baseline_of(page.runs[1]) is None  # not that of another seed


def test_folder_that_is_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "l2e")
    (tmp_path / "link").symlink_to("l2e")
    (run,) = runs.read([Path("l2e"), tmp_path / "l2e", Path("link")]).runs
    assert run.name == "l2e"


@pytest.mark.parametrize("place", [0, 1])
def test_study_and_one_of_its_runs(tmp_path, place):
    """It is the study's, whichever comes first."""
    given = [paired_study(tmp_path / "main")]
    given.insert(place, tmp_path / "main/runs/70m-l2e-seed1235")
    page = runs.read(given)
    assert sorted((variant.name, len(variant.runs)) for variant in page.variants) == [("70m l2e", 2), ("70m none", 2)]
    assert all(page.baseline_of(run) is not None for run in page.runs if run.method == "l2e")


def test_second_run_of_a_seed_is_no_further_seed(tmp_path):
    first, other = write_run(tmp_path / "first", seed=1), write_run(tmp_path / "other", seed=2)
    shutil.copytree(first, tmp_path / "copy")
    (variant,) = runs.read([first, tmp_path / "copy", other]).variants
    assert [run.name for run in variant.runs] == ["first", "copy", "other"]
    assert [run.name for run in variant.seeds] == ["first", "other"]


def test_two_studies_of_one_title(tmp_path):
    for name in ("first", "second"):
        paired_study(tmp_path / name, seeds=(1234,))
    page = runs.read([tmp_path / "first", tmp_path / "second"])
    assert page.titles == ["Main comparison", f"Main comparison ({tmp_path / 'second'})"]
    assert len(page.variants) == 4
    assert len({run.name for run in page.runs}) == 4
    assert page.baseline_of(page.runs[3]) is page.runs[2]


def test_study_whose_baseline_inhibits(tmp_path):
    """It decides by itself what is compared."""
    entries = []
    for share in ("0.01", "0.02"):
        base = None if share == "0.01" else "share0.01"
        entries.append({"name": f"share{share}", "levels": {"share": share}, "seed": 1234, "baseline": base})
        write_run(tmp_path / "study/runs" / f"share{share}", inhibition__target_share=float(share))
    page = runs.read([write_study(tmp_path / "study", entries)])
    assert page.baseline_of(page.runs[1]) is page.runs[0]


def test_number():
    line = json.loads('{"layer2/tau": 2.0, "layer10/tau": 4.0, "layer2/mean_s": null, "x": true, "layer2/taus": 9.0}')
    assert number(line, "layers/tau") == 3.0
    assert number(line, "layers/mean_s") is None
    assert number(line, "x") is None
    assert number(line, "nowhere") is None


def test_last_tenth():
    lines = [{"step": step} for step in range(2, 101, 2)]
    assert mean_of_last_tenth(lines, "step") == 96  # of 92, 94, 96, 98, 100
    assert mean_of_last_tenth([], "step") is None and mean_of_last_tenth(lines, "tau") is None
    # of steps 136 to 150, the lines have 13, cut at 135, and 2
    uneven = [{"step": step, "loss": loss} for step, loss in ((120, 9.0), (148, 4.0), (150, 4.6))]
    assert mean_of_last_tenth(uneven, "loss") == pytest.approx((13 * 4.0 + 2 * 4.6) / 15)
