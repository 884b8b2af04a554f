"""What the steps between two lines of metrics add up to."""

import math

import pytest
import torch

from l2e_ds.config.batch import BatchArithmetic
from l2e_ds.inhibition import Inhibitor
from l2e_ds.run_directory.metric_table import find
from l2e_ds.training.interval import Interval

LAYERS, CPU = [3, 5], torch.device("cpu")


@pytest.fixture
def interval() -> Interval:
    """Of two micro-batches a step."""
    return Interval(BatchArithmetic(global_batch=8, micro_batch=4, accumulation=2, ranks=1, tokens_per_step=128), CPU)


def statistics(step: int) -> torch.Tensor:
    """[2, 8], other numbers for each layer and name."""
    return 10.0 * step + torch.arange(2.0 * len(Inhibitor.STATISTICS), dtype=torch.float64).reshape(2, -1)


def test_values_by_hand(interval):
    for step, (losses, applied) in enumerate([((4.0, 2.0), True), ((5.0, 7.0), False), ((1.0, 2.0), True)]):
        for loss in losses:
            interval.add_loss(torch.tensor(loss), torch.tensor(loss / 8))
        interval.add_step(applied, 0.1 * step, statistics(step) if applied else None)
    values = interval.values(LAYERS)
    assert all(find("train", key) for key in values)
    assert values["lm_loss"] == 8 * values["z_loss"] == (3.0 + 6.0 + 1.5) / 3
    assert (interval.steps, values["skipped_steps"], values["learning_rate"]) == (3, 1, 0.2)
    assert values["tokens_per_second"] * values["step_seconds"] == pytest.approx(128)
    first, last = (dict(zip(Inhibitor.STATISTICS, statistics(step).T.tolist(), strict=True)) for step in (0, 2))
    for index, layer in enumerate(LAYERS):
        for name in ("observed_share", "selected_score"):
            assert values[f"layer{layer}/{name}"] == (first[name][index] + last[name][index]) / 2
        for name in ("tau", "mean_s", "coefficient", "strength", "lm_gradient"):
            assert values[f"layer{layer}/{name}"] == last[name][index]
    assert values["inhibition_loss"] == (sum(first["inhibition_loss"]) + sum(last["inhibition_loss"])) / 2
    weighted = [sum(map(math.prod, zip(of["coefficient"], of["inhibition_loss"], strict=True))) for of in (first, last)]
    assert values["inhibition_loss_weighted"] == sum(weighted) / 2
    assert values["coefficient"] == sum(last["coefficient"]) / 2
    assert values["observed_share"] == sum(first["observed_share"] + last["observed_share"]) / 4


@pytest.mark.parametrize("layers", [[], LAYERS], ids=["not inhibited", "every step skipped"])
def test_without_statistics(interval, layers):
    interval.add_loss(torch.tensor(2.0))
    interval.add_step(False, 0.1, None)
    assert interval.spikes == 0
    values = interval.values(layers)
    assert not {"inhibition_loss", "z_loss"} & values.keys() and not any(key.startswith("layer") for key in values)
    interval.add_step(False, 0.1, None, is_spike=True)
    assert (interval.skipped, interval.spikes) == (2, 1)


def test_newest_loss(interval):
    interval.add_loss(torch.tensor(math.nan))
    assert not interval.is_loss_finite()
    interval.add_loss(torch.tensor(1.0))
    assert interval.is_loss_finite()


def test_pauses_and_waits(interval, monkeypatch):
    """By a clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    interval._begin = 90.0
    with interval.paused():
        now[0] += 4
    with interval.waiting_for_data():
        now[0] += 1
    interval.add_loss(torch.tensor(1.0))
    interval.add_step(True, 0.1, None)
    values = interval.values([])
    assert (values["step_seconds"], values["data_wait_seconds"]) == (11.0, 1.0)
