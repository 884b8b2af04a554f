"""What counts as a spike; that it is skipped: tests/distributed/test_runs.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from l2e_ds.training.spikes import find_spike

BEFORE = [1.0, 3.0, 2.0, 2.0]


def test_the_limit_is_so_many_standard_deviations_above_the_mean():
    limit = np.mean(BEFORE) + 6 * np.std(BEFORE)
    assert find_spike(limit - 1e-9, BEFORE, 6, 4) is None
    spike = find_spike(limit + 1e-9, BEFORE, 6, 4)
    assert spike is not None
    assert (spike.norm, spike.mean, spike.deviation) == pytest.approx((limit, np.mean(BEFORE), np.std(BEFORE)))


def test_a_small_norm_and_one_that_is_not_finite_are_none():
    for norm in (0.0, math.inf, math.nan):
        assert find_spike(norm, BEFORE, 0.1, 4) is None


def test_fewer_steps_than_the_window_skip_nothing():
    assert find_spike(1e9, BEFORE, 6, 5) is None
    assert find_spike(1e9, [], 6, 2) is None


def test_a_window_that_was_longer_before_resuming_counts_whole():
    spike = find_spike(1e9, BEFORE, 6, 2)
    assert spike is not None and spike.mean == 2.0
