"""`InhibitionCallback` under data parallelism: two ranks give what one plain PyTorch loop gives."""

from __future__ import annotations

import pytest
import torch

from tests.processes import REPOSITORY
from tests.unit.test_hf_trainer import plain_loop, sequences


@pytest.mark.full
def test_two_ranks_are_one(run_ranks, tmp_path):
    """Every step's averaged gradients, moments and thresholds, whether tokens are counted over the ranks or by each."""
    run_ranks(2, REPOSITORY / "tests/distributed/workers/hf_trainer.py", tmp_path)
    notes, inhibitor = plain_loop(sequences(32))
    for name in ("mean", "own"):
        gradients, state = torch.load(tmp_path / f"{name}.pt")
        assert len(gradients) == 4
        for one, two in zip(gradients, notes.gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-6)
        for key, value in inhibitor.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6, msg=key)
