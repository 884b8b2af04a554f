"""`l2e-ds summary`."""

import json
import re
from dataclasses import replace

import pytest

from l2e_ds.cli import main
from l2e_ds.config.reading import load_run_config
from l2e_ds.config.sections import flat
from l2e_ds.report.runs import read, read_run
from l2e_ds.report.statistics import steady_median
from l2e_ds.report.summary import _baseline
from l2e_ds.run_directory.metrics import of_kind, read_lines
from tests.processes import REPOSITORY
from tests.unit.report.making import write_run


def summary(run, capsys, *options):
    assert main(["summary", str(run), *options]) == 0
    return capsys.readouterr().out


def test_first_and_last_figures(tmp_path, capsys):
    text = summary(write_run(tmp_path / "l2e", shrink=0.4), capsys)
    assert "8.0000 (step 0) -> 5.0000 (step 100)" in text
    assert "layer 2 shrank to 40% of its mean S at step 0 (0.3 to 0.12 at step 100)" in text


def test_speed_is_the_report_s(tmp_path, capsys):
    """The run has two starts, and the first interval of each is slow, as it compiles."""
    path = write_run(tmp_path / "l2e") / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    start, training = (next(line for line in lines if line["kind"] == kind) for kind in ("start", "train"))
    speeds = [10.0, 1000.0, 1100.0], [20.0, 1200.0]
    written = []
    for first, of_start in zip((1, 4), speeds, strict=True):
        written.append(start | {"step": first - 1})
        written += [training | {"step": first + n, "tokens_per_second": speed} for n, speed in enumerate(of_start)]
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    assert re.search(r"tokens/s +1,100 \(median\)", summary(tmp_path / "l2e", capsys))
    assert steady_median(read([tmp_path / "l2e"]).runs[0], "tokens_per_second") == 1100.0


def test_figures_that_are_not_finite(tmp_path, capsys):
    """Training writes null for them; of a mixture also for one set."""
    sets = [{"name": name, "weight": 1.0, "source": "stdlib"} for name in ("prose", "code")]
    data = {"data__sets": sets, "data__source": None, "data__train_tokenizer": None, "data__tokenizer": "t.json"}
    path = write_run(tmp_path / "l2e", **data) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line |= {"tokens/prose": 1000, "tokens/code": 2000}
    lost = ("held_out_loss", "held_out_loss/prose", "layer2/top_share_score", "layer2/mean_s")
    lines[-1] |= dict.fromkeys(lost)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(tmp_path / "l2e", capsys)
    assert "8.0000 (step 0) -> not finite (step 100)" in text
    assert re.search(r"of prose +13\.0000 -> not finite \(1,000 tokens\)", text)
    assert re.search(r"of code +12\.0000 -> 9\.0000 \(2,000 tokens\)", text)
    assert re.search(r"layer 2: mean S +0\.300 -> -", text)
    assert "shrank" not in text


def test_texts(tmp_path, capsys):
    """The second was added when the run resumed."""
    texts = [{"name": name, "source": "stdlib"} for name in ("own", "late")]
    path = write_run(tmp_path / "l2e", evaluation__texts=texts) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["step"] < 50:
            line.pop("text_loss/late", None), line.pop("text_bits_per_byte/late", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary(tmp_path / "l2e", capsys)
    end = r" -> 6\.0000 \(step 100, 1\.2500 bits a byte\)$"
    assert re.search(r"^text own +9\.0000 \(step 0\)" + end, text, re.M)
    assert re.search(r"^text late +7\.5000 \(step 50\)" + end, text, re.M)


def test_layers_since_inhibition_began(tmp_path, capsys):
    """Inhibition begins at 30 of 100 steps; mean S decreases linearly."""
    run = write_run(tmp_path / "l2e", shrink=0.8, inhibition__start=0.3)
    text = summary(run, capsys)
    assert "8.0000 (step 0) -> 5.0000 (step 100)" in text
    assert re.search(r"^layer 2: mean S +0\.282 \(step 30, before inhibition\) -> 0\.240$", text, re.M)
    assert "shrank" not in text
    waiting = write_run(tmp_path / "waiting", until=20, inhibition__start=0.3)
    assert re.search(r"^layer 2: mean S +0\.300 -> 0\.300$", summary(waiting, capsys), re.M)


def test_baseline(tmp_path, capsys):
    run = write_run(tmp_path / "l2e", shrink=0.8, inhibition__start=0.3)
    none = write_run(tmp_path / "none", "none", loss=4.9, shrink=0.9, training__precision="bf16")
    text = summary(run, capsys, "--baseline", str(none))
    assert "5.0000 (step 100); 4.9000 without inhibition\n" in text
    assert re.search(r"layer 3: mean S .* -> 0\.240; 0\.270 without inhibition\n", text)
    assert re.search(rf"^without inhibition +{none}, same seed \(2026-11-25, bf16\)$", text, re.M)
    path = none / "metrics.jsonl"
    path.write_text(path.read_text().replace('"kind": "start",', '"kind": "start", "held_out_tokens": 5,', 1))
    assert f"{none}, same seed (2026-11-25, bf16, other text)" in summary(run, capsys, "--baseline", str(none))


def test_a_longer_baseline_with_the_same_schedule(tmp_path, capsys):
    run = write_run(tmp_path / "l2e", optimizer__schedule_steps=200)
    none = write_run(tmp_path / "none", "none", loss=4.9, optimizer__schedule_steps=200, training__steps=150)
    assert "5.0000 (step 100); 4.9000 without inhibition\n" in summary(run, capsys, "--baseline", str(none))


def test_ms_of_another_share_is_not_compared(tmp_path, capsys):
    run = write_run(tmp_path / "l2e", inhibition__target_share=0.005)
    none = write_run(tmp_path / "none", "none", loss=4.9, inhibition__target_share=0.025)
    text = summary(run, capsys, "--baseline", str(none))
    assert re.search(r"^layer 2: MS of the top 0\.5% +16\.000 -> 16\.000$", text, re.M)
    assert re.search(r"^layer 2: mean S +0\.300 -> 0\.300; 0\.300 without inhibition$", text, re.M)
    assert "MS not compared: it is that of its top 2.5%" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "l2e"}, "is inhibited itself"),
        ({"seed": 1}, "has another training.seed"),
        ({"data__sequence_length": 128}, "has another data.sequence_length"),
        ({"until": 60}, "has no evaluation at step 100"),
        ({"training__steps": 200}, "has another training.steps, on which the learning rate depends"),
    ],
)
def test_run_that_is_no_baseline(tmp_path, capsys, changes, words):
    run = write_run(tmp_path / "l2e")
    other = write_run(tmp_path / "other", **({"method": "none"} | changes))
    text = summary(run, capsys, "--baseline", str(other))
    assert re.search(rf"^without inhibition +{other} {words}: not compared$", text, re.M)
    assert text.count("without inhibition") == 1


def test_baseline_that_is_not_there(tmp_path, capsys):
    assert main(["summary", str(write_run(tmp_path / "l2e")), "--baseline", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"l2e-ds: error: {tmp_path / 'none'}: there is no such folder\n"


def test_stored_baseline_is_the_quick_start_s():
    """Same configuration but for inhibition, and an evaluation at its last step and where inhibition begins."""
    recipe = load_run_config(REPOSITORY / "launch/recipes/quickstart.yaml")
    stored = REPOSITORY / "launch/quickstart-none"
    (begin,) = [line for line in of_kind(read_lines(stored), "evaluation") if line["step"] == recipe.inhibition.start]
    found, about = _baseline(stored, replace(read_run(stored), config=flat(recipe)), 160)
    assert about.startswith(f"{stored}, same seed") and found["step"] == 160
    assert found["layer2/top_share_score"] > begin["layer2/top_share_score"] > 0  # it rises by itself
