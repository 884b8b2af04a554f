"""The programs in docs/examples, as a user starts them; each ends with a check of its own."""

from __future__ import annotations

import re
import sys

import pytest

from tests.processes import REPOSITORY


@pytest.mark.full
@pytest.mark.parametrize("program", ["pytorch_loop.py", "hf_trainer.py", "deepspeed_engine.py"])
def test_example(program, launch):
    done = launch(sys.executable, REPOSITORY / "docs/examples" / program, HF_HUB_OFFLINE="1")
    assert done.end() == 0, done.said()[-3000:]
    (share,) = re.findall(r"observed share.*: ([\d.]+)% \(target 2.00%\)", done.said())
    assert 1.5 < float(share) < 2.5
    assert len(re.findall(r"loss\W+[\d.]+", done.said())) >= 5 and "tau" in done.said()
