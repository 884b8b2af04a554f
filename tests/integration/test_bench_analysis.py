"""`python -m benchmarks analysis` at a tiny size. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main

TINY = ["--model", "pythia-14m", "--texts", "240", "--sequence-length", "4", "--batch", "60", "--rounds", "2"]


@pytest.mark.full
def test_table_says_what_was_measured(tmp_path, capsys):
    assert main(["analysis", *TINY, "--round-texts", "60", "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/analysis.json").read_text())
    assert record["date"] and record["machine"] and "torch" in record["versions"]
    assert {name: len(times) for name, times in record["rounds"].items()} == {"forward": 2, "first": 2, "second": 2}
    assert [whole["texts"] for whole in record["wholes"]] == [60, 240]
    for whole in record["wholes"]:
        assert whole["peak"] > 0 and whole["forward"] > 0 and all(seconds > 0 for seconds in whole["seconds"].values())
    page = (tmp_path / "out/analysis.md").read_text()
    assert page in capsys.readouterr().out and str(tmp_path) not in page
    rounds = zip(*(record["rounds"][name] for name in ("forward", "first", "second")), strict=True)
    low, high = sorted((first + second) / (2 * forward) for forward, first, second in rounds)
    assert f"| both against two forward passes | {(low + high) / 2:.2f} ({low:.2f} to {high:.2f}) |" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "pythia-1"], "--model: got 'pythia-1', allowed: pythia-14m"),
        (["--rounds", "0"], "--rounds: got 0, allowed: an integer >= 1"),
        (["--texts", "12"], "--texts: got 12, allowed: an integer >= 240"),
    ],
)
def test_bad_options(capsys, words, says):
    assert main(["analysis", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"l2e-ds: error: {says}")
