"""The command itself, in a fresh process each time: ZeRO-3 alone, then the same run file on two ranks under ZeRO-1."""

import pytest

from tests.processes import finish
from tests.tolerances import rounding, selection


def train(ranks: int, *arguments: object) -> str:
    """Train, and return what the run printed."""
    codes, said = finish("-m", "l2e_ds.train", *arguments, ranks=ranks)
    assert codes == [0] * ranks, said[-6000:]
    return said


def test_other_ranks_and_stage_by_resume_alone(run_file, tmp_path, metric_lines):
    stage_1, stage_3 = (f"deepspeed.config=ds_configs/zero{stage}.json" for stage in (1, 3))
    straight = f"training.run_directory={tmp_path / 'straight'}"
    # alone with the micro-batches of two ranks: the projected loss depends on that cut (docs/method.md 5.2)
    train(1, run_file, stage_3, "training.steps=3", "training.micro_batch=4")
    said = train(2, run_file, stage_1)
    assert "resumed in another layout: 1 rank, ZeRO 3 -> 2 ranks, ZeRO 1\n" in said
    train(2, run_file, stage_1, straight)
    resumed, uninterrupted = (
        [[line[key] for key in ("step", "lm_loss", "learning_rate", "layer1/tau")] for line in metric_lines(path)]
        for path in (tmp_path / "run", tmp_path / "straight")
    )
    assert len(resumed) == 6
    allowed = (0, rounding(6, layers=4, tokens=8 * 16), 0, selection(8 * 16, neurons=128))
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        for one, other, by in zip(ours, theirs, allowed, strict=True):
            assert one == pytest.approx(other, rel=by)
