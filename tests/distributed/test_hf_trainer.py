"""`InhibitionCallback` under data parallelism: two ranks give what one plain PyTorch loop gives."""

from __future__ import annotations

import pytest
import torch

from tests.processes import REPOSITORY
from tests.unit.test_hf_trainer import plain_loop, sequences, train


@pytest.mark.full
def test_two_ranks_are_one(run_ranks, tmp_path):
    """Every step's averaged gradients, moments and thresholds: of sequences of one length whether tokens are counted
    over the ranks or by each, and of padded ones, of which the ranks have different numbers of tokens."""
    run_ranks(2, REPOSITORY / "tests/distributed/workers/hf_trainer.py", tmp_path)
    padded, callback, _ = train(tmp_path / "alone", sequences(32, padded=True), accumulation=4)
    whole = plain_loop(sequences(32))
    for name, (notes, inhibitor) in {"mean": whole, "own": whole, "padded": (padded, callback.inhibitor)}.items():
        gradients, state = torch.load(tmp_path / f"{name}.pt")
        assert len(gradients) == 4
        for one, two in zip(gradients, notes.gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-6)
        for key, value in inhibitor.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6, msg=key)
