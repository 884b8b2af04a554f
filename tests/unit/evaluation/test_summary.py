"""`l2e-ds summary`."""

import json
import re

from l2e_ds.cli import main
from l2e_ds.report.runs import read
from l2e_ds.report.statistics import steady_median
from tests.unit.report.making import write_run


def summary(run, capsys):
    assert main(["summary", str(run)]) == 0
    return capsys.readouterr().out


def test_first_and_last_figures(tmp_path, capsys):
    text = summary(write_run(tmp_path / "l2e", shrink=0.4), capsys)
    assert "8.0000 (step 0) -> 5.0000 (step 100)" in text
    assert "layer 2 shrank to 40% of its mean S at step 0 (0.3 to 0.12 at step 100)" in text


def test_speed_is_the_report_s(tmp_path, capsys):
    """Of a run with two starts, whose first intervals compiled and are slow."""
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
