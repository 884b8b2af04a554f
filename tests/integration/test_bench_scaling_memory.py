"""`python -m benchmarks scaling` and `memory` at tiny sizes. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import statistics

import pytest

from benchmarks import memory, overhead
from benchmarks.__main__ import main
from l2e_ds.inhibition.hook import NeuronHook
from tests.processes import finish

SCALING = ("--neurons", "8", "--tokens", "4", "--layers", "1", "2", "--rounds", "2", "--models", "pythia-14m")


@pytest.mark.full
@pytest.mark.parametrize("ranks", ["own", "launched"])
def test_scaling(tmp_path, ranks):
    """All shapes and ranks are measured; bytes are those of the packed buffer; the table has the measurements."""
    count = {"own": 1, "launched": 2}[ranks]
    words = ["scaling", *SCALING, "--ranks", "2", "--output", tmp_path / "out"]
    codes, said = finish("-m", "benchmarks", *words, ranks=count)
    assert codes == [0] * count, said[-4000:]
    record = json.loads((tmp_path / "out/scaling.json").read_text())
    assert record["date"] and record["machine"] and "torch" in record["versions"]
    assert record["neurons"][0]["neurons"] == 8 and record["tokens"][0]["tokens"] == 4
    for operation in (*record["neurons"], *record["tokens"]):
        assert all(len(times) == 2 and min(times) > 0 for times in operation["passes"].values())
    assert {name: len(times) for name, times in record["layers"].items()} == {"1": 2, "2": 2}
    size = record["sizes"]["pythia-14m"]
    assert size["packed"] == 2 * 8 * NeuronHook.buffer_size(512) and size["gradients"] == 4 * 14_067_712
    assert list(record["all_reduce"]) == ["2"]
    table = (tmp_path / "out/scaling.md").read_text()
    assert table in said and str(tmp_path) not in table
    times = record["all_reduce"]["2"][0]
    assert all(len(times[name]) == 2 and min(times[name]) > 0 for name in ("packed", "gradients"))
    ratio = 100 * statistics.median(times["packed"]) / statistics.median(times["gradients"])
    row = next(line for line in table.splitlines() if line.startswith("| 2 | pythia-14m"))
    assert row.endswith(f"| {ratio:.1f} |")


@pytest.mark.full
def test_memory(tmp_path, capsys):
    """L2E keeps nothing that grows with tokens, MEmeL the selection: a byte for each activation of two layers."""
    words = [
        "--vocabulary",
        "64",
        "--sequence-length",
        "64",
        "--micro-batches",
        "1",
        "3",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["memory", *words]) == 0
    record = json.loads((tmp_path / "o/memory.json").read_text())
    assert record["tokens"] == [64, 192] and list(record["found"]) == [overhead.NONE, *overhead.VARIANTS]
    for variant in ("L2E", "L2E, plain operations", "L2E, reduce: forward"):
        assert [one["kept"] for one in record["found"][variant]] == [one["kept"] for one in record["found"]["none"]]
        assert memory.per_token(record, variant, "kept") == 0
    assert memory.per_token(record, "MEmeL", "kept") == 2 * 512
    assert memory.per_token(record, "L2E", "peak") == 0 < memory.per_token(record, "MEmeL", "peak")
    for one in (one for sizes in record["found"].values() for one in sizes):
        assert one["peak"] > one["kept"] > 0
    assert record["found"]["L2E"][0]["state"] >= 2 * 8 * NeuronHook.buffer_size(512)
    assert (tmp_path / "o/memory.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scaling", "--neurons", "0"], "--neurons: got 0, allowed: an integer >= 1"),
        (["scaling", "--rounds", "0"], "--rounds: got 0, allowed: an integer >= 1"),
        (["scaling", "--models", "pythia-1"], "--models: got 'pythia-1', allowed: pythia-14m"),
        (["memory", "--model", "pythia-1"], "--model: got 'pythia-1', allowed: pythia-14m"),
        (["memory", "--micro-batches", "4"], "--micro-batches: got 4, allowed: at least two"),
        (["memory", "--sequence-length", "1"], "--sequence-length: got 1"),
    ],
)
def test_bad_options(capsys, words, says):
    assert main([*words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"l2e-ds: error: {says}")
