"""`python -m benchmarks faults`, shortened: two kinds of faults on real runs (the whole: docs/RELIABILITY.md)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from benchmarks.reliability import faults
from tests.processes import finish

# ranks are killed by both: while they save, and in the middle of a step before one bit of what they saved is flipped
CHOSEN = ["save", "bit-flipped"]
PROGRAM = f"""
import sys
from benchmarks.__main__ import main
from benchmarks.reliability import faults
faults.KINDS = {{kind: faults.KINDS[kind] for kind in {CHOSEN}}}
sys.exit(main())
"""


@pytest.mark.full
def test_two_faults_cost_no_run_and_no_wrong_resume(tmp_path):
    output = tmp_path / "out"
    words = ["faults", "--faults", len(CHOSEN), "--output", output]
    codes, said = finish("-c", PROGRAM, *words, timeout=1500)
    assert codes == [0], said[-8000:]
    record = json.loads((output / "faults.json").read_text())
    kinds = set(CHOSEN) - set(record["not_injected"])
    assert set(record["not_injected"]) <= (set() if os.geteuid() == 0 else set(faults.ON_DISK))
    found = {fault["kind"]: fault for fault in record["faults"]}
    assert found.keys() == kinds and len(record["faults"]) == len(kinds)
    for fault in found.values():
        assert fault["lost"] is None and fault["wrong"] == [] and fault["starts"] >= 1
        assert fault["compared"] > 0, "no line after the resume was compared"
        assert 0 <= fault["redone"] == fault["step"] - fault["resumed"] <= 3 * faults.EVERY
        assert 0 < fault["restart_seconds"] <= fault["outage_seconds"]
    assert record["ends_differ"] is None

    # that they were injected indeed
    log = (output / "disturbed.log").read_text()
    unused = re.findall(r"checkpoints/(\S+): (\S+) (.*); it is not used", log)
    flipped, words = re.search(r"(step\d+)/", found["bit-flipped"]["detail"])[1], "is not what was written|manifest"
    assert any(step == flipped and re.search(words, f"{file} {what}") for step, file, what in unused), log
    assert log.count("exit code 247 (SIGKILL)") == len(kinds - set(faults.ON_DISK))
    assert found["save"]["resumed"] <= found["save"]["step"] - faults.EVERY + 10, "the checkpoint that was cut off"

    text = (output / "faults.md").read_text()
    assert f"| **all** | **{len(kinds)}** | **0** | **0** |" in text
    assert str(tmp_path) not in text and os.uname().nodename not in text.split()
    assert not Path(output / "small disk/run").exists(), "the small disk is still mounted"
