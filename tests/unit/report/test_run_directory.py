"""Files of a run or a study that are broken: one line that names the file, of the report and of the summary alike."""

import json
import re

import pytest
import yaml

from l2e_ds.cli import main
from l2e_ds.config.sections import CheckpointConfig
from l2e_ds.errors import DataError
from l2e_ds.report import runs
from l2e_ds.report.summary import summarise
from l2e_ds.run_directory.configuration import read_config
from l2e_ds.run_directory.metrics import of_kind, read_lines
from tests.unit.report.making import paired_study, write_run

TRAIN, EVALUATION = 2, 1  # of write_run's lines, counted from 0: a start, an evaluation, then training
REMOVED = object()


def report(run):
    return runs.read([run])


both = pytest.mark.parametrize("reader", [report, summarise])


def refusal(reader, folder):
    with pytest.raises(DataError) as raised:
        reader(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change_line(run, place, **values):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[place] = {key: value for key, value in (lines[place] | values).items() if value is not REMOVED}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- folder ------------------------------------------------------------------------------------------------------


@both
def test_no_folder(tmp_path, reader):
    assert refusal(reader, tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: there is no such folder"
    (tmp_path / "file").write_text("")
    assert refusal(reader, tmp_path / "file") == f"{tmp_path / 'file'}: is a file, not a folder"
    assert "is no run directory" in refusal(reader, tmp_path)


# --- config.yaml -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "old, new, words",
    [
        ("method: l2e", "method: zzz", ": inhibition.method: got 'zzz'; must be 'none', 'l2e' or 'memel'"),
        (r"target_share: [\d.]+", "target_share: null", ": inhibition.target_share: got None; must be a valid number"),
        (r"target_share: [\d.]+", "target_share: .inf", ": inhibition.target_share: got inf; "),
        (r"(?s).*", "", ": a run file is a mapping"),
        (r"(?s).*", "- 1", ": a run file is a mapping"),
        (r"(?s).*", "a: [", ":1: "),
        (r"(?s).*", "1: 2", ": model: is required"),
    ],
)
def test_broken_configuration(tmp_path, reader, old, new, words):
    path = write_run(tmp_path / "l2e") / "config.yaml"
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    assert refusal(reader, tmp_path / "l2e").startswith(f"{path}{words}")


@both
def test_configuration_that_is_no_text_or_not_there(tmp_path, reader):
    path = write_run(tmp_path / "l2e") / "config.yaml"
    path.write_bytes(b"\xff")
    assert refusal(reader, tmp_path / "l2e") == f"{path}: is not UTF-8 text"
    path.unlink()
    assert refusal(reader, tmp_path / "l2e") == f"{path}: No such file or directory"


def test_a_run_of_a_study_that_is_just_starting_is_not_in_the_report_yet(tmp_path):
    """It opens its metrics before it writes its configuration, which takes a while with some monitors."""
    study = paired_study(tmp_path)
    starting = study / "runs/70m-l2e-seed1234"
    (starting / "config.yaml").unlink()
    (starting / "metrics.jsonl").write_text("")
    page = report(study)
    assert len(page.runs) == 3 and page.waiting == [starting.name]


@both
def test_sections_that_an_older_run_does_not_have(tmp_path, reader):
    path = write_run(tmp_path / "l2e") / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: config[key] for key in ("model", "data", "training", "inhibition")}))
    reader(tmp_path / "l2e")
    assert read_config(tmp_path / "l2e").checkpoint == CheckpointConfig()


def test_scores_of_another_share_are_not_compared(tmp_path):
    """A resume changed the share: MS of the top share from then on is that of other activations."""
    run = write_run(tmp_path / "l2e", points=2)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    places = [place for place, line in enumerate(lines) if line["kind"] == "evaluation"]
    begins = places[-2]
    start = lines[0] | {"step": lines[begins]["step"], "changes": ["inhibition.target_share: 0.01 -> 0.02"]}
    lines.insert(begins, start)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report(run).runs[0].evaluations
    has_score = [any(key.endswith("/top_share_score") for key in line) for line in found]
    assert len(found) == len(places) > 2 and has_score == [False] * (len(places) - 2) + [True] * 2
    assert all("held_out_loss" in line and "layer2/mean_s" in line for line in found)
    layer = report(run).runs[0].layers[0]
    (said,) = (line for line in summarise(run).splitlines() if line.startswith(f"layer {layer}: MS"))
    assert f"(step {start['step']}; of another share before)" in said
    assert f"{found[-2][f'layer{layer}/top_share_score']:.3f} (step" in said


# --- metrics.jsonl -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "place, key, value, words",
    [
        (TRAIN, "tokens", REMOVED, "has no tokens"),
        (TRAIN, "step", REMOVED, "has no step"),
        (TRAIN, "lm_loss", REMOVED, "has no lm_loss"),
        (TRAIN, "tokens_per_second", REMOVED, "has no tokens_per_second"),
        (EVALUATION, "tokens", REMOVED, "has no tokens"),
        (EVALUATION, "held_out_loss", REMOVED, "has no held_out_loss"),
        (0, "step", REMOVED, "has no step"),
        (TRAIN, "step", "2", "step: got '2', must be a whole number"),
        (TRAIN, "step", -2, "step: got -2, must be a whole number"),
        (TRAIN, "step", 10**30, f"step: got {10**30}, must be a whole number"),
        (TRAIN, "tokens", None, "tokens: got None, must be a whole number"),
        (TRAIN, "tokens/code", 1.5, "tokens/code: got 1.5, must be a whole number"),
        (TRAIN, "applied_steps", True, "applied_steps: got True, must be a whole number"),
        (TRAIN, "lm_loss", "5.0", "lm_loss: got '5.0', must be a number or null"),
        (TRAIN, "layer2/tau", [1], "layer2/tau: got [1], must be a number or null"),
        (0, "git", "0123", "git: got '0123', must be a mapping"),
        (0, "versions", None, "versions: got None, must be a mapping"),
        (0, "ranks", [2], "ranks: got [2], must be a whole number"),
        (0, "kind", REMOVED, "is no line of a run's metrics"),
    ],
)
def test_broken_line(tmp_path, reader, place, key, value, words):
    path = change_line(write_run(tmp_path / "l2e"), place, **{key: value})
    assert refusal(reader, tmp_path / "l2e") == f"{path}:{place + 1}: {words}"


def test_figures_that_no_chart_can_take(tmp_path):
    """Python's json reads NaN and Infinity; the line's other figures stay."""
    huge = [float("nan"), float("inf"), float("-inf"), 1e308, -1e39, 10**400]
    keys = ["lm_loss", "gradient_norm", "tokens_per_second", "layer2/tau", "layer2/mean_s", "layer3/tau"]
    change_line(write_run(tmp_path / "l2e"), TRAIN, **dict(zip(keys, huge, strict=True)))
    line = of_kind(read_lines(tmp_path / "l2e"), "train")[0]
    assert [line[key] for key in keys] == [None] * 6
    assert line["layer3/mean_s"] == 0.3


def test_figures_that_an_older_run_does_not_have(tmp_path):
    run = write_run(tmp_path / "l2e")
    change_line(run, -1, **{"layer2/mean_s": REMOVED, "layer3/top_share_score": REMOVED})
    change_line(run, -2, observed_share=None, tokens_per_second=None)
    text = summarise(run)
    assert re.search(r"layer 2: mean S +0\.300 -> -", text)
    assert re.search(r"layer 3: mean S +0\.300 -> 0\.300", text)
    assert "observed share" not in text


def test_report_of_such_figures(tmp_path, capsys):
    """Such values are in every line of training but one, and at the first and last line that is used."""
    run = write_run(tmp_path / "l2e")
    path = run / "metrics.jsonl"
    text = re.sub(r'"(lm_loss|layer3/tau|gradient_norm)": [\d.e-]+', r'"\1": Infinity', path.read_text())
    text = re.sub(r'"(layer2/tau|held_out_loss)": [\d.e-]+', r'"\1": 1e308', text)
    path.write_text(text)
    change_line(run, TRAIN, **{"lm_loss": 1e38, "layer2/tau": 1e38, "gradient_norm": 5e-324})
    change_line(run, TRAIN + 1, **{"lm_loss": -1e38, "layer2/tau": 5e-324, "gradient_norm": 1e38})
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "l2e: held-out loss, in 11 of 11 lines, first at step 0" in page
    assert "Infinity" not in page
    assert main(["summary", str(run)]) == 0
    assert "not finite (step 0) -> not finite (step 100)" in capsys.readouterr().out


# --- study.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, words",
    [
        (r'"levels": \{[^}]*\}', '"levels": null', "runs.0.levels: got None; must be a valid dictionary"),
        (r'"directory": "[^"]*"', '"directory": 7', "runs.0.directory: got 7; must be a valid string"),
        (r'"baseline": null', '"baseline": ["x"]', "runs.0.baseline: got ['x']; must be a valid string"),
        (r'"runs": \[', '"runs": [null, ', "runs.0: got None; "),
        (r'"runs": .*', '"runs": null}', "runs: got None; must be a valid list"),
        (r'"runs": .*', '"runs": [{}]}', "runs.0.name: is required"),
        (r'"title": "[^"]*"', '"title": null', "title: got None; must be a valid string"),
        (r"70m-l2e", "70m-none", "runs: two have the same name"),
        (r".*", '["title", "factors", "seeds", "evaluate", "runs"]', "is no index of a study"),
        (r".*", "{", "is no index of a study"),
        (r".*", "[]", "is no index of a study"),
    ],
)
def test_broken_study(tmp_path, old, new, words):
    path = paired_study(tmp_path / "main", seeds=(1234,)) / "study.json"
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    assert refusal(report, tmp_path / "main").startswith(f"{path}: {words}")
