"""`python -m benchmarks overhead` at a tiny size on two real ranks. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import statistics

import pytest

from benchmarks import overhead
from benchmarks.__main__ import main
from tests.processes import finish

TINY = ("--models", "pythia-14m", "model.num_layers=4", "model.hidden_size=32", "model.num_heads=2")
TINY += ("model.vocab_size=64", "--sequence-length", "16", "--micro-batch", "2", "--rounds", "2", "--wide-tokens", "4")


@pytest.mark.full
def test_two_ranks(tmp_path):
    """Every variant is measured as often as the others, and the table says what the measurements do."""
    output = tmp_path / "out"
    codes, said = finish("-m", "benchmarks", "overhead", *TINY, "--output", output, ranks=2)
    assert codes == [0, 0], said[-4000:]
    record = json.loads((output / "overhead.json").read_text())
    assert record["ranks"] == 2 and record["date"] and {"torch", "deepspeed"} <= record["versions"].keys()
    found = record["models"]["pythia-14m"]
    assert found["layers"] == 2 and found["operation"]["neurons"] == 128 and found["operation"]["tokens"] == 32
    variants = list(overhead.VARIANTS)
    assert list(found["step_seconds"]) == [overhead.NONE, *variants]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found["step_seconds"].values())
    for operation in (found["operation"], record["wide"]):
        assert list(operation["passes"]) == [overhead.NONE, *variants] and list(operation["steps"]) == variants
        assert all(len(values) == 10 for part in ("passes", "steps") for values in operation[part].values())
    assert record["wide"]["neurons"] == 10_240 and len(record["wide"]["top_k"]) == 10
    table = (output / "overhead.md").read_text()
    assert table in said and str(tmp_path) not in table
    passes, none = found["operation"]["passes"]["MEmeL"], found["operation"]["passes"]["none"]
    added = statistics.median(one - other for one, other in zip(passes, none, strict=True))
    once = statistics.median(found["operation"]["steps"]["MEmeL"])
    share = 2 * (added + once) / 1e3 / statistics.median(found["step_seconds"]["none"])
    row = next(line for line in table.splitlines() if line.startswith("| MEmeL |"))
    assert row.split("|")[2].strip().startswith(f"{added:.2f} (") and row.split("|")[4].strip() == f"{100 * share:.2f}"


def test_interval_of_the_median():
    """The interval of 20 values is from the 6th to the 15th (Conover's table); of few the whole range."""
    assert overhead.median_interval([float(i) for i in range(1, 21)]) == (6.0, 15.0)
    assert overhead.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", "pythia-13m"], "--models: got 'pythia-13m', allowed: pythia-14m"),
        (["--rounds", "0"], "--rounds: got 0, allowed: an integer >= 1"),
        (["--wide-tokens", "-1"], "--wide-tokens: got -1, allowed: an integer >= 0"),
        (["--precision", "fp8"], "bench: training.precision: got 'fp8'"),
        (["--deepspeed", "none.json"], "--deepspeed: no such file: none.json"),
        (["training.seed=1"], "override 'training.seed=1'"),
    ],
)
def test_bad_options(capsys, words, says):
    assert main(["overhead", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"l2e-ds: error: {says}")
