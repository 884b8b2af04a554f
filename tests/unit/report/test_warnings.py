"""Each warning: what gives it, and what just does not."""

import json
import shutil
from datetime import datetime, timedelta, timezone

import pytest

from l2e_ds.errors import DataError
from l2e_ds.report import runs
from l2e_ds.report.warnings import all_warnings
from tests.unit.report.making import paired_study, write_run, write_study

KINDS = {
    "lost": "loss that is not finite",
    "worse": "loss worse than the paired baseline's",
    "shrunk": "a layer that shrinks",
    "share": "observed share off its target",
    "skipped": "skipped steps",
    "dead": "neurons that die",
    "repeated": "run that is no further seed",
    "scores": "scores that do not compare",
    "other": "compared with another configuration",
    "differ": "runs that differ in more than inhibition",
    "unfinished": "not finished",
}


def warnings_of(*folders):
    return [(warning.kind, warning.text, warning.where) for warning in all_warnings(runs.read(folders))]


def texts(kind, *folders):
    return [text for found, text, _ in warnings_of(*folders) if found == KINDS[kind]]


def test_nothing_to_warn_of(tmp_path):
    assert warnings_of(write_run(tmp_path / "none", "none"), write_run(tmp_path / "l2e", loss=4.9)) == []


@pytest.mark.parametrize(
    "kind, keys, words",
    [
        ("shrunk", {"shrink": 0.49}, "l2e: layer 2 shrank to 49% of its mean S at step 0 (0.3 to 0.147 at step 100)"),
        ("share", {"share": 0.0223}, "l2e: layer 2 had 2.23% selected, target 2.00% (last tenth of 100 steps)"),
        ("share", {"share": 0.0177}, "l2e: layer 2 had 1.77% selected, target 2.00% (last tenth of 100 steps)"),
        ("skipped", {"skipped": 2}, "l2e: 2 of 100 steps were skipped (2.0%)"),
        ("dead", {"dead": 0.02}, "l2e: layer 2 has 2.0% dead neurons, at first 0.0%"),
        ("unfinished", {"until": 98}, "l2e: at step 98 of 100, last line written"),
    ],
)
def test_of_one_run(tmp_path, kind, keys, words):
    found = warnings_of(write_run(tmp_path / "l2e", **keys))
    assert {name for name, _, _ in found} == {KINDS[kind]}
    assert found[0][1].startswith(words)
    assert found[0][2].startswith("docs/")


@pytest.mark.parametrize(
    "keys", [{"shrink": 0.51}, {"share": 0.0217}, {"share": 0.0183}, {"skipped": 1}, {"dead": 0.009}, {"until": 100}]
)
def test_of_one_run_just_not(tmp_path, keys):
    assert warnings_of(write_run(tmp_path / "l2e", **keys)) == []


def test_each_layer_is_named(tmp_path):
    layers = [text.partition(" shrank")[0] for text in texts("shrunk", write_run(tmp_path / "l2e", shrink=0.1))]
    assert layers == ["l2e: layer 2", "l2e: layer 3"]


def test_what_the_guard_said(tmp_path):
    """The warning has the guard's words, and none of its own for a layer that the guard has compared with others."""
    path = write_run(tmp_path / "l2e", shrink=0.1) / "metrics.jsonl"
    start, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    said = [
        {
            "kind": "guard",
            "step": 100,
            f"layer3/{name}": ratio,
            "reference_step": 0,
            "text": f"{name}!",
            "advice": "rest",
        }
        for name, ratio in (("shrank", 0.1), ("grew", 3.0), ("rose", 1.2))
    ]

    def write(*more: dict) -> None:
        path.write_text("".join(json.dumps(line) + "\n" for line in (start | {"guard": "warn"}, *lines, *more)))

    write()
    assert warnings_of(tmp_path / "l2e") == []
    write(*said)
    assert warnings_of(tmp_path / "l2e") == [
        ("a layer that shrinks", "l2e: shrank!; rest", "docs/looking-inside.md"),
        ("a layer that grows", "l2e: grew!; rest", "docs/looking-inside.md"),
        ("a layer that becomes more monosemantic for inhibition", "l2e: rose!; rest", "docs/looking-inside.md"),
    ]
    write(said[0] | {"text": 3})
    with pytest.raises(DataError, match=r"metrics.jsonl:\d+: text: got 3, must be text"):
        warnings_of(tmp_path / "l2e")


def test_when_the_last_line_was_written(tmp_path):
    folder = write_run(tmp_path / "l2e", until=50)
    written = runs.read([folder]).runs[0].written
    assert abs(written - datetime.now(timezone.utc)) < timedelta(minutes=1)
    (text,) = texts("unfinished", folder)
    assert text == f"l2e: at step 50 of 100, last line written {written:%Y-%m-%d %H:%M} UTC"


def test_loss_that_is_not_finite(tmp_path):
    """Training writes null for it; here from step 80 on."""
    path = write_run(tmp_path / "l2e") / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= dict.fromkeys({"lm_loss", "held_out_loss"} & set(line), None) if line["step"] >= 80 else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert texts("lost", tmp_path / "l2e") == [
        "l2e: held-out loss, in 3 of 11 lines, first at step 80",
        "l2e: training loss, in 11 of 50 lines, first at step 80",
    ]


# --- pairs -------------------------------------------------------------------------------------------------------


def test_worse_than_the_only_baseline(tmp_path):
    none, worse = write_run(tmp_path / "none", "none"), write_run(tmp_path / "l2e", loss=5.002)
    assert texts("worse", none, worse) == [
        "l2e: held-out loss higher than that of none by 0.0020, one pair of runs (step 100)"
    ]


def test_worse_by_more_than_the_standard_error(tmp_path):
    """Pairs differ by 0.1 and 0.3: 0.2 with a standard error of 0.1. Then by -0.1 and 0.2: 0.05 with 0.15."""
    for name, gains, expected in (("clear", (0.1, 0.3), True), ("chance", (-0.1, 0.2), False)):
        folders = []
        for seed, gain in enumerate(gains):
            folders.append(write_run(tmp_path / name / f"none{seed}", "none", seed))
            folders.append(write_run(tmp_path / name / f"l2e{seed}", "l2e", seed, loss=5.0 + gain))
        found = texts("worse", *folders)
        by = "by 0.2000 ± 0.1000, standard error of n = 2 pairs of runs (step 100)"
        assert found == ([f"l2e: held-out loss higher than that of none {by}"] if expected else [])


def test_worse_at_the_same_step_only(tmp_path):
    """A run at step 50 has a higher loss than its baseline has by now, but not than that had at 50."""
    none, young = write_run(tmp_path / "none", "none"), write_run(tmp_path / "l2e", loss=4.9, until=50)
    assert texts("worse", none, young) == []


def test_second_run_of_a_seed(tmp_path):
    first, other = write_run(tmp_path / "first", seed=1), write_run(tmp_path / "other", seed=2)
    shutil.copytree(first, tmp_path / "copy")
    assert texts("repeated", first, other) == []
    assert texts("repeated", first, tmp_path / "copy", other) == [
        "copy has the seed and configuration of first: counted once"
    ]


# --- other configurations ----------------------------------------------------------------------------------------


def test_runs_that_nobody_can_pair(tmp_path):
    none = write_run(tmp_path / "none", "none")
    other = write_run(tmp_path / "l2e", training__seed=7, training__global_batch=32)
    assert texts("differ", none, other) == ["2 runs: training.global_batch 16, 32; training.seed 1234, 7"]


def test_scores_of_other_layers_and_shares(tmp_path):
    none, own = write_run(tmp_path / "none", "none"), write_run(tmp_path / "l2e", loss=4.9)
    share = write_run(tmp_path / "share", loss=4.9, inhibition__target_share=0.005)
    assert texts("scores", none, own) == []
    assert texts("scores", none, own, share) == ["70m: MS of the top share is of the target shares 2%, 0.5%"]
    path = share / "metrics.jsonl"
    path.write_text(path.read_text().replace("layer3/", "layer11/"))
    assert texts("scores", none, share)[0] == "70m: MS, mean S and kurtosis are of the layers 2 3; 2 11"


@pytest.mark.parametrize("keys", [{}, {"inhibition__coefficient": 0.5}, {"training__micro_batch": 2}])
def test_runs_that_differ_in_inhibition_or_nothing_that_matters(tmp_path, keys):
    assert texts("differ", write_run(tmp_path / "a"), write_run(tmp_path / "b", **keys)) == []


def test_two_sizes_each_with_its_baseline(tmp_path):
    folders = [write_run(tmp_path / f"{m}{s}", m, size=s, loss=4.9) for m in ("none", "l2e") for s in ("70m", "410m")]
    assert texts("differ", *folders) == []


def test_study_that_compares_with_another_configuration(tmp_path):
    entries = [
        {"name": name, "levels": {"method": name}, "seed": 1, "baseline": "none" if name == "l2e" else None}
        for name in ("none", "l2e")
    ]
    study = write_study(tmp_path / "study", entries)
    write_run(study / "runs/none", "none")
    write_run(study / "runs/l2e", loss=4.9, training__global_batch=32)
    assert texts("other", study) == ["none and l2e: training.global_batch 16 and 32"]
    assert warnings_of(paired_study(tmp_path / "proper", ("70m", "410m"))) == []


def test_runs_of_a_study_that_have_not_begun(tmp_path):
    entries = [{"name": name, "levels": {"method": name}, "seed": 1, "baseline": None} for name in ("none", "l2e")]
    study = write_study(tmp_path / "study", entries)
    write_run(study / "runs/none", "none")
    assert texts("unfinished", study) == ["1 have written nothing yet: l2e"]


def test_the_gravest_first(tmp_path):
    none = write_run(tmp_path / "none", "none")
    bad = write_run(tmp_path / "l2e", loss=6.0, shrink=0.1, share=0.05, skipped=9, dead=0.5, until=90)
    kinds = list(dict.fromkeys(kind for kind, _, _ in warnings_of(none, bad)))
    assert kinds == [KINDS[name] for name in ("worse", "shrunk", "share", "skipped", "dead", "unfinished")]
