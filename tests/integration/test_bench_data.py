"""`python -m benchmarks data` at a tiny size, but for its part that trains pythia-70m. Nothing depends on speed."""

from __future__ import annotations

import json

import pytest

from benchmarks import data
from benchmarks.__main__ import main
from l2e_ds.data.tokenizer import train_tokenizer
from tests.integration.conftest import SENTENCES


@pytest.fixture
def words(tmp_path) -> list[str]:
    train_tokenizer(iter(SENTENCES), 300).save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    return ["data", "--text", str(text), "--tokenizer", str(tmp_path / "tokenizer/tokenizer.json")]


@pytest.mark.full
def test_tables_say_what_was_measured(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "SIZES", (10**5, 10**6))
    monkeypatch.setattr(data, "READ", 1 << 17)
    options = ["--processes", "1", "--rounds", "1", "--repeat", "3", "--only", "tokenize", "memory", "reader", "open"]
    assert main([*words, *options, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/data.json").read_text())
    tokenized = record["tokenize"]
    assert (
        tokenized["tokens"] > 3 * len(SENTENCES) and tokenized["bytes"] == 3 * (tmp_path / "text.jsonl").stat().st_size
    )
    assert {name: len(times) for name, times in tokenized["seconds"].items()} == {
        "l2e-ds tokenize": 1,
        "datasets.map and a writer": 1,
    }
    sizes = [row["bytes"] for row in record["memory"]["rows"]]
    assert [size / sizes[0] for size in sizes] == [1, 2, 4, 8]
    assert all(row["peak_bytes"] > 0 for row in record["memory"]["rows"])
    assert all(len(speeds) == 10 for speeds in record["reader"]["sequences_per_second"].values())
    assert [row["tokens"] for row in record["open"]["rows"]] == [10**5, 10**6]
    page = (tmp_path / "out/data.md").read_text()
    assert page in capsys.readouterr().out and str(tmp_path) not in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.json", "data.md"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rounds", "0"], "--rounds: got 0, allowed: an integer >= 1"),
        (["--gpt-neox", "nowhere"], "--gpt-neox: nowhere has no tools/datasets/preprocess_data.py"),
        (["--text", "no.jsonl"], "no such file: no.jsonl"),
    ],
)
def test_bad_options(words, capsys, more, says):
    assert main([*words, *more]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"l2e-ds: error: {says}")
