"""`l2e-ds accept` on this machine's CPU, where its parts run small."""

import json

import pytest

from l2e_ds.acceptance.command import PARTS
from l2e_ds.cli import main


@pytest.mark.full
def test_every_part_runs_and_is_written_down(capsys, tmp_path):
    file = tmp_path / "accept.json"
    assert main(["accept", "--minutes", "1000", "--output", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"nothing failed; {file}" in said
    found = {part["part"]: part for part in json.loads(file.read_text())["parts"]}
    assert list(found) == list(PARTS)
    assert all(part["results"] and not part["reason"] for part in found.values()), found
    for name in ("activation", "loss", "settings", "resume", "waits", "auto"):
        assert found[name]["passed"] is True
        assert f"pass  {name}" in said
    assert found["waits"]["results"]["synchronisations"] == 0
    assert found["settings"]["results"]["ways"] >= 3


def test_a_part_that_fails_is_said_and_ends_with_1(capsys, tmp_path, monkeypatch):
    """A loss whose gradient is a thousandth too large; the other parts go on."""
    from l2e_ds.acceptance import operations

    real = operations.chunked_cross_entropy
    monkeypatch.setattr(operations, "chunked_cross_entropy", lambda *given: 1.001 * real(*given))
    file = tmp_path / "accept.json"
    assert main(["accept", "--only", "loss", "ceilings", "--output", str(file)]) == 1
    said = capsys.readouterr().out
    assert "FAIL  loss" in said and "failed: loss" in said
    assert [part["part"] for part in json.loads(file.read_text())["parts"]] == ["ceilings", "loss"]


def test_what_does_not_fit_into_the_minutes_is_said(capsys, tmp_path):
    assert main(["accept", "--minutes", "1e-9", "--only", "resume", "--output", str(tmp_path / "a.json")]) == 0
    assert "not run: --minutes is over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "los"], "--only: got 'los', allowed: ceilings, activation, loss"),
        (["--output", "."], "--output: got ., allowed: a file"),
        (["--minutes", "nan"], "--minutes: got nan, allowed: above 0"),
        (["--minutes", "0"], "--minutes: got 0, allowed: above 0"),
        (
            ["--output", "/nowhere/a.json"],
            "--output: got /nowhere/a.json, allowed: a file in a folder that can be written to",
        ),
    ],
)
def test_bad_input(capsys, words, said):
    assert main(["accept", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
