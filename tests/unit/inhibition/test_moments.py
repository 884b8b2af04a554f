"""Running moments against NumPy on the concatenated data. Shapes: M samples, N neurons."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from l2e_ds.inhibition.losses import VARIANCE_FLOOR
from l2e_ds.inhibition.moments import Moments, exact_sums, fade_factor, shifted_sums

NEURONS = 6
COUNTS = (1, 7, 64, 3, 200)


def batches(offset: float, counts: tuple[int, ...] = COUNTS, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = np.random.default_rng(7)
    spread = np.linspace(0.5, 2, NEURONS)
    return [torch.tensor(offset + spread * rng.standard_normal((m, NEURONS))).to(dtype) for m in counts]


def moments_of(z: torch.Tensor, shift: float = 0.0, sums=exact_sums, weight: torch.Tensor | None = None) -> Moments:
    shift_by = torch.full((z.shape[1],), shift, dtype=torch.float64)
    count = torch.tensor(float(z.shape[0]), dtype=torch.float64) if weight is None else weight.double().sum()
    return Moments.from_sums(count, *sums(z, shift_by, weight), shift_by)


def merged(parts: list[Moments]) -> Moments:
    total = Moments.empty(NEURONS)
    for part in parts:
        total = total.merge(part)
    return total


def as_numpy(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([part.double() for part in parts]).numpy()


@pytest.mark.parametrize("offset", [0.0, -3.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["exact", "shifted"])
def test_equal_numpy_on_the_concatenated_data(offset, dtype, how):
    """Mean and sample variance of unequal batches are those of all samples together, also far from zero.

    Low-precision inputs are taken as the numbers that they are.
    """
    data = batches(offset, dtype=dtype)
    sums, shift = (exact_sums, 0.0) if how == "exact" else (shifted_sums, offset + 0.3)
    total = merged([moments_of(z, shift, sums) for z in data])
    reference = as_numpy(data)
    assert float(total.count) == len(reference)
    np.testing.assert_allclose(total.mean.numpy(), reference.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(total.variance.numpy(), reference.var(0, ddof=1), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("sums", [exact_sums, shifted_sums])
def test_the_sums_are_the_written_out_sums(sums):
    """Both functions return sum(z - shift) and sum((z - shift)^2), whatever route they take."""
    (z,) = batches(2.0, (50,))
    shift = torch.linspace(1.5, 2.5, NEURONS, dtype=torch.float64)
    sum_d, sum_d2 = sums(z, shift)
    d = z.double().numpy() - shift.numpy()
    assert sum_d.dtype == sum_d2.dtype == torch.float64
    np.testing.assert_allclose(sum_d.numpy(), d.sum(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(sum_d2.numpy(), (d * d).sum(0), rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 50, None])
def test_fading_equals_the_weighted_formula(window):
    """A sample seen k steps ago weighs exp(-k / window), in the count too."""
    data = batches(1.0)
    factor = fade_factor(window)
    assert factor == pytest.approx(1.0 if window is None else math.exp(-1 / window), rel=1e-14)
    total = Moments.empty(NEURONS)
    for z in data:
        total = total.fade(factor).merge(moments_of(z))
    ages = np.concatenate([np.full(len(z), len(data) - 1 - i) for i, z in enumerate(data)])
    weight = np.ones(len(ages)) if window is None else np.exp(-ages / window)
    reference = as_numpy(data)
    mean = (weight[:, None] * reference).sum(0) / weight.sum()
    variance = (weight[:, None] * (reference - mean) ** 2).sum(0) / (weight.sum() - 1)
    np.testing.assert_allclose(float(total.count), weight.sum(), rtol=1e-12)
    np.testing.assert_allclose(total.mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(total.variance.numpy(), variance, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_merge_is_associative_and_commutative(offset):
    """Any order of merging gives the same moments, up to float64 rounding."""
    a, b, c = (moments_of(z) for z in batches(offset, (5, 40, 11)))
    left, right, turned = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)
    for other in (right, turned):
        for name in ("count", "mean", "m2"):
            torch.testing.assert_close(getattr(left, name), getattr(other, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sums", [exact_sums, shifted_sums])
def test_padding_does_not_count(sums):
    """With a weight of 0 and 1 the moments are those of the kept samples, however wild the others are."""
    (z,) = batches(3.0, (60,))
    keep = torch.arange(60) % 3 != 0
    kept = z[keep]
    z = z.clone()
    z[~keep] = 1e6
    total = moments_of(z, 3.0, sums, keep.float().reshape(-1, 1))
    reference = kept.double().numpy()
    assert float(total.count) == int(keep.sum())
    np.testing.assert_allclose(total.mean.numpy(), reference.mean(0), rtol=1e-6)
    np.testing.assert_allclose(total.variance.numpy(), reference.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("sums", [exact_sums, shifted_sums])
def test_nothing_but_padding_is_empty(sums):
    """A batch of padding changes nothing and brings no NaN."""
    (z,) = batches(3.0, (8,))
    empty = moments_of(z, 0.0, sums, torch.zeros(8, 1))
    assert float(empty.count) == 0
    before = moments_of(batches(0.0, (20,))[0])
    after = before.merge(empty)
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=0)


def test_empty():
    """Before any sample: count, mean and variance are 0; merging empty with empty stays so."""
    for moments in (Moments.empty(NEURONS), Moments.empty(NEURONS).merge(Moments.empty(NEURONS)).fade(0.5)):
        assert float(moments.count) == 0
        assert moments.mean.tolist() == moments.variance.tolist() == [0.0] * NEURONS


def test_single_sample_has_no_variance():
    """One sample: its value is the mean, the variance is 0; the second sample gives NumPy's variance."""
    first, second = batches(2.0, (1, 1))
    one = moments_of(first)
    np.testing.assert_allclose(one.mean.numpy(), first[0].double().numpy(), rtol=1e-6)
    assert one.variance.tolist() == [0.0] * NEURONS
    two = one.merge(moments_of(second))
    np.testing.assert_allclose(two.variance.numpy(), as_numpy([first, second]).var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 17.3, 1000.1])
@pytest.mark.parametrize("sums", [exact_sums, shifted_sums])
def test_constant_data_counts_as_dead(value, sums):
    """A neuron that never changes has a variance that counts as none, over several batches."""
    data = [torch.full((m, NEURONS), value) for m in (700, 33, 2048)]
    shift = 0.0 if sums is exact_sums else value
    total = merged([moments_of(z, shift, sums) for z in data])
    assert float(total.variance.max()) <= VARIANCE_FLOOR
    np.testing.assert_allclose(total.mean.numpy(), np.float32(value), rtol=1e-6)
