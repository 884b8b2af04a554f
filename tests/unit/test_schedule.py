"""The learning rate of each step, in every schedule."""

import math
from itertools import pairwise

import pytest

from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.engine.schedule import Schedule, schedule_of
from l2e_ds.errors import ConfigError
from tests.unit.test_changes import RUN

PEAK = 6e-4


def schedule(steps: int, **optimizer) -> Schedule:
    given = RUN | {"optimizer": {"peak_learning_rate": PEAK, **optimizer}}
    return schedule_of(checked(RunConfig, given | {"training": {**RUN["training"], "steps": steps}}, "test"))


def rates(steps: int, **optimizer) -> list[float]:
    made = schedule(steps, **optimizer)
    return [made.rate(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1000, 0.01), (14_300, 0.01), (400, 0.25), (100, 0.07), (3, 0.5), (150, 0.01), (100, 7)]
)
@pytest.mark.parametrize("final_ratio", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_rises_to_the_peak_and_falls_to_its_end(steps, warmup, final_ratio, name):
    """It is not zero at first, rises linearly to the peak, and falls to exactly `final_ratio`, where it stays."""
    shape = {"cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)), "linear": lambda p: 1 - p}[name]
    w = warmup * steps if isinstance(warmup, float) else warmup
    found = rates(steps, schedule=name, warmup=warmup, final_ratio=final_ratio)
    assert found[0] > 0
    assert max(found) <= PEAK * (1 + 1e-12)
    rising = math.ceil(w - 1e-9)
    for step, rate in enumerate(found):
        if step + 1 < rising:
            assert rate == pytest.approx(PEAK * (step + 1) / w, rel=1e-9)
        elif step + 1 > rising:
            left = shape((step + 1 - w) / (steps - w))
            assert rate == pytest.approx(PEAK * (final_ratio + (1 - final_ratio) * left), rel=1e-9, abs=1e-15)
    if abs(w - round(w)) < 1e-9:
        assert found[round(w) - 1] == pytest.approx(PEAK, rel=1e-12)
    assert all(a <= b for a, b in pairwise(found[: max(1, rising - 1)]))
    assert all(a >= b - 1e-15 for a, b in pairwise(found[rising:]))
    after = schedule(steps, schedule=name, warmup=warmup, final_ratio=final_ratio).rate(steps + 50)
    assert found[-1] == pytest.approx(PEAK * final_ratio, rel=1e-12, abs=1e-15)
    assert after == pytest.approx(PEAK * final_ratio, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("name", ["cosine", "linear", "warmup-stable-decay", "inverse-square-root", "constant"])
def test_of_short_runs_and_no_warmup(steps, name):
    """No warm-up, or less than a step of it: finite, positive, never above the peak, falling."""
    for warmup in (0, 0.0, 0.01, 0.8):
        found = rates(steps, schedule=name, warmup=warmup)
        assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)
        if warmup * steps < 1:
            assert all(a >= b for a, b in pairwise(found))


def test_warmup_stable_decay():
    """Rising in 4 steps, at the peak, and over the last 5 of 20 in equal parts to a tenth; in steps or in shares."""
    expected = [*(PEAK * n / 4 for n in (1, 2, 3)), *([PEAK] * 12), *(PEAK * (1 - 0.18 * n) for n in range(1, 6))]
    for durations in ({"warmup": 4, "decay": 5}, {"warmup": 0.2, "decay": 0.25}):
        made = schedule(20, schedule="warmup-stable-decay", **durations)
        assert [made.rate(step) for step in range(20)] == pytest.approx(expected, rel=1e-12)
        assert made.rate(30) == pytest.approx(PEAK / 10)
    assert rates(20, schedule="warmup-stable-decay", warmup=0, decay=0) == [PEAK] * 20


def test_inverse_square_root_and_constant():
    """The first is at half of its peak after four times its warm-up; neither depends on the length of the run."""
    for steps in (20, 40):
        made = schedule(steps, schedule="inverse-square-root", warmup=5)
        assert [made.rate(step) for step in (0, 4, 19)] == pytest.approx([PEAK / 5, PEAK, PEAK / 2], rel=1e-12)
        made = schedule(steps, schedule="constant", warmup=5)
        assert [made.rate(step) for step in (0, 4, 19, 1000)] == pytest.approx([PEAK / 5, PEAK, PEAK, PEAK], rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"schedule": "step"}, "optimizer.schedule: got 'step'; must be 'cosine', 'linear', 'warmup-stable-decay', "),
        ({"warmup": -1}, "optimizer.warmup: got -1; must be a whole number of steps, or a share"),
        ({"warmup": 1.5}, "optimizer.warmup: got 1.5; must be a whole number of steps, or a share"),
        (
            {"warmup": 21},
            "optimizer.warmup: got warmup 21, in all 21 steps, allowed: up to optimizer.schedule",
        ),
        (
            {"schedule": "warmup-stable-decay", "warmup": 10, "decay": 0.6},
            "optimizer.decay: got warmup 10 and decay 0.6, in all 22 steps, allowed: up to optimizer.schedule",
        ),
    ],
)
def test_bad_input(optimizer, said):
    with pytest.raises(ConfigError) as error:
        schedule(20, **optimizer)
    assert said in str(error.value)


def test_is_said_in_words():
    assert str(schedule(20, schedule="warmup-stable-decay", warmup=4, decay=5)) == (
        "peak 0.0006 after 4 steps of warm-up, then constant, linear to 0.1 of it in the last 5 of 20 steps"
    )
    assert str(schedule(2000)) == "peak 0.0006 after 20 steps of warm-up, then cosine to 0.1 of it at step 2,000"
