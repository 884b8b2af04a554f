"""`l2e-ds doctor` between real ranks: in order, with one rank that differs, with one that fails."""

import re
from pathlib import Path

import pytest

from tests.processes import finish

DOCTOR = ("-m", "l2e_ds.cli", "doctor", "--seconds", "1")

# Rank 1 has another torch and adds something else than it should; or it fails in the middle.
RANK_ONE = """
import os, sys
from l2e_ds.doctor import all_reduce, command, ranks
from l2e_ds.system.process import leave_process
import pytest

fault, *arguments = sys.argv[1:]

def fail(*_):
    raise OSError("this rank's cable is out")

if os.environ["RANK"] == "1":
    if fault == "differs":
        real = ranks.installed_version
        ranks.installed_version = lambda package: "2.12.0" if package == "torch" else real(package)
        all_reduce._weight = lambda rank: rank + 2
    else:
        all_reduce.measure = fail
leave_process(command.main(arguments))
"""


def test_two_ranks_in_order(tmp_path):
    codes, said = finish(*DOCTOR, "--directory", tmp_path, ranks=2)
    assert codes == [0, 0], said
    for expected in (
        r"launcher +torchrun or deepspeed: 2 ranks",
        r"versions +the same on all 2 ranks",
        r"host +\S+: ranks 0, 1; CPU",
        r"all-reduce +the sum of 2 ranks was right [\d,]+ times \(gloo",
        r"latency +8 B: [\d,]+ us",
        r"bandwidth +64 MiB: [\d.]+ ms, [\d.]+ GB/s \(bus [\d.]+ GB/s\)",
    ):
        assert len(re.findall(rf"^ok +{expected}", said, re.MULTILINE)) == 1, (expected, said)  # rank 0 alone speaks
    assert "a run can start here" in said.splitlines()


@pytest.mark.full
def test_a_rank_that_differs_and_one_that_fails(tmp_path):
    script = tmp_path / "rank_one.py"
    script.write_text(RANK_ONE)
    options = ("--seconds", "1", "--directory", tmp_path)
    codes, said = finish(script, "differs", *options, ranks=2)
    assert 1 in codes, said
    assert re.search(r"^missing +versions +rank [01] \(\S+\): torch \S+, the other ranks ", said, re.MULTILINE), said
    assert re.search(r"^missing +all-reduce +wrong sums at ranks 0, 1 \(", said, re.MULTILINE), said
    assert "a run cannot start here; missing: versions, all-reduce" in said.splitlines()

    codes, said = finish(script, "fails", *options, ranks=2)
    assert 1 in codes, said
    named = r"^missing +all-reduce +rank 1 \(\S+\): OSError: this rank's cable is out$"
    assert re.search(named, said, re.MULTILINE), said
    assert "a run can start here" not in said
    assert [path.name for path in Path(tmp_path).iterdir()] == [script.name]
